"""The pages that say where things are, against the tree."""

from __future__ import annotations

import re
from pathlib import Path

FOLDERS = ("checkpoints", "engine", "kernels", "server", "training")


def section(page: str, title: str) -> str:
    """The lines under the heading that begins with ``title``."""
    found = re.search(rf"^### {title}\b.*?$(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"docs/architecture.md has no section {title}"
    return found.group(1)


def test_architecture_names_every_module_and_no_other(root: Path) -> None:
    page = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        named = set(re.findall(r"`(\w+\.py)`", section(page, folder)))
        there = {path.name for path in (root / folder).rglob("*.py")}
        if folder == "server":
            named |= set(re.findall(r"`(\w+\.py)`", section(page, "server/sessions")))
        assert there - named == set(), f"{folder}: not in docs/architecture.md"
        assert named - there == set(), f"{folder}: in docs/architecture.md and not in the tree"


def test_every_page_that_the_readme_names_is_there(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    pages = re.findall(r"`((?:docs|deploy|loadtests)/[\w.-]+\.md)`", readme)
    assert pages
    assert [page for page in pages if not (root / page).is_file()] == []
