"""The tree as the packaging tests see it: Python files by folder, and what each imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("checkpoints", "engine", "kernels", "server", "training")


def imports_of(path: Path) -> set[str]:
    """Every module that a file names in an import, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # `from mnemosyne.engine import state` names the module mnemosyne.engine.state.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def imports() -> dict[str, dict[str, set[str]]]:
    """Folder -> file (relative to the root) -> imported names."""

    def files(folder: str) -> Iterator[tuple[str, set[str]]]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), imports_of(path)

    return {folder: dict(files(folder)) for folder in FOLDERS}
