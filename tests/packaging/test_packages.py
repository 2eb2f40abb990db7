"""What is installed is what stands in the tree, under names that collide with nobody's."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

FOLDERS = ("checkpoints", "engine", "kernels", "server", "training")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_list_of_packages_is_the_tree(root: Path, project: dict[str, Any]) -> None:
    tree = {
        "mnemosyne." + ".".join(path.parent.relative_to(root).parts)
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == tree


def test_every_folder_is_typed_and_none_is_a_regular_package(root: Path) -> None:
    for folder in FOLDERS:
        assert (root / folder / "py.typed").is_file(), folder
        # A top-level package `kernels` with an __init__ would be executed by other people's libraries.
        assert not (root / folder / "__init__.py").exists(), folder


def test_a_package_of_that_name_elsewhere_wins_over_our_kernels_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n", encoding="utf-8")
    paths = [str(root), str(tmp_path)]
    code = f"import sys; sys.path[:0] = {paths!r}; import kernels; print(kernels.theirs)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == "True"


def test_the_wheel_holds_the_checkpoint_and_every_module(
    root: Path, project: dict[str, Any], tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for folder in FOLDERS:
        subprocess.run(["cp", "-R", str(root / folder), str(tree / folder)], check=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((root / name).read_bytes())
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", build, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    expected = {
        f"mnemosyne/{path.relative_to(root).as_posix()}"
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
    }
    shipped = {f"mnemosyne/checkpoints/mnemosyne-1/{name}" for name in checkpoint_files()}
    assert expected | shipped <= names
    assert all(name.startswith("mnemosyne") for name in names)


def checkpoint_files() -> tuple[str, ...]:
    return ("config.json", "model.safetensors", "tokenizer.json", "prompt.json", "README.md")


def test_the_lock_pins_every_dependency_within_its_range(root: Path, project: dict[str, Any]) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (root / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }
    extras = project["project"]["optional-dependencies"].values()
    for text in [*project["project"]["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{text}: the lock has {pin}"


def test_the_version_is_the_one_of_the_changelog(root: Path, project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert importlib.metadata.version("mnemosyne") == version
    assert f"## [{version}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_machine_path_in_the_tree(root: Path) -> None:
    pattern = re.compile(r"/(?:home|Users|work|root)/[a-z]")
    own = Path(__file__).resolve()
    suffixes = {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".sh", ".txt", ".cfg"}
    named = [root / name for name in ("Makefile", "Dockerfile", ".ci/run", ".dockerignore")]
    folders = (*FOLDERS, "tests", "docs", "deploy", "loadtests", "requirements")
    files = [p for f in folders for p in (root / f).rglob("*") if p.suffix in suffixes]
    wrong = [
        f"{path.relative_to(root)}:{number}"
        for path in [*files, *named, *root.glob("*.md"), root / "pyproject.toml"]
        if path != own and path.is_file() and path.stat().st_size < 1_000_000
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong
