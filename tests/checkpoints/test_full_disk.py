"""A disk without room: what can't be written is refused whole, and what was written before stays readable."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.errors import StoreUnavailable


@pytest.fixture(params=["full disk", "file limit"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder with room for 300 KB, and what makes room.

    Once a file system that is full (as root, on Linux), once a limit on a file's size, which any system has.
    """
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "full disk":
        command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
        mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("can't mount a tmpfs here; the same test runs under a file limit")
        try:
            yield folder / "data", lambda: _run("mount", "-o", "remount,size=20m", str(folder))
        finally:
            _run("umount", str(folder))
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        try:
            yield folder / "data", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def test_a_full_disk_loses_nothing(small: tuple[Path, Callable[[], None]]) -> None:
    root, make_room = small
    store = DirectoryStore(root)
    store.create("a", "t", b"made")
    fence = store.acquire("a", "me", 600).fence
    store.append("a", [b"kept" * 1000], fence)
    store.spool_append("a", "d", 0, b"kept", fence)
    store.put_snapshot("a", 1, b"kept", fence)
    refused: list[Callable[[], object]] = [
        lambda: store.append("a", [b"x", b"y" * 500_000], fence),
        lambda: store.spool_append("a", "d", 4, b"y" * 500_000, fence),
        lambda: store.spool_append("a", "e", 0, b"y" * 500_000, fence),
        lambda: store.put_snapshot("a", 2, b"y" * 500_000, fence),
        lambda: store.put_snapshot("a", 1, b"y" * 500_000, fence),
        lambda: store.create("b", "t", b"y" * 500_000, ("key", b"value")),
    ]
    sizes = {path: path.stat().st_size for path in root.rglob("*") if path.is_file() and path.name != "lock"}
    for call in refused:
        with pytest.raises(StoreUnavailable):
            call()
        left = {
            path: path.stat().st_size for path in root.rglob("*") if path.is_file() and path.name != "lock"
        }
        left.pop(root / "sessions" / "a" / "spool" / "e", None)
        assert left == sizes, "a write that failed takes no room"
    for reader in (store, DirectoryStore(root)):
        assert list(reader.read("a")) == [b"made", b"kept" * 1000]
        assert reader.spool_read("a", "d", 0, 10**6) == b"kept"
        assert reader.spool_length("a", "e") == 0
        assert [ref.version for ref in reader.list_snapshots("a")] == [1]
        assert reader.get_snapshot("a", 1) == b"kept"
        assert reader.list_sessions("t", None, 9) == ["a"] and reader.get_idempotent("key") is None
    assert store.append("a", [b"small"], fence) == 3, "what still fits is still written"
    make_room()
    for call in refused:
        call()
    assert store.append("a", [], fence) == 5 and store.exists("b")


def test_a_disk_full_to_the_last_byte(small: tuple[Path, Callable[[], None]]) -> None:
    root, make_room = small
    store = DirectoryStore(root)
    store.create("a", "t", b"made")
    fence = store.acquire("a", "me", 600).fence
    kept = 1
    with pytest.raises(StoreUnavailable):
        while True:
            kept = store.append("a", [b"x" * 5000], fence)
    assert kept > 20
    assert len(list(store.read("a"))) == len(list(DirectoryStore(root).read("a"))) == kept
    make_room()
    assert store.append("a", [b"x"], fence) == kept + 1
