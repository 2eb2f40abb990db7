"""What is particular to a directory: damage, torn tails, leftovers, modes, dead owners, a full disk."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mnemosyne.checkpoints import framing, lease_file
from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.errors import (
    LeaseLost,
    SessionBusy,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotUnsupported,
    StoreUnavailable,
)

WORKER = Path(__file__).with_name("store_worker.py")
RECORDS = [b"made", b"one", b"two" * 20, b"", b"\0\0\0", b"last"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    return DirectoryStore(root)


@pytest.fixture
def fence(store: DirectoryStore) -> int:
    store.create("a", "t", RECORDS[0], ("key", b"value"))
    return store.acquire("a", "me", 600).fence


@pytest.fixture
def journal(root: Path, store: DirectoryStore, fence: int) -> Path:
    """Of a session with three frames: one record, four of a batch, one."""
    store.append("a", RECORDS[1:5], fence)
    store.append("a", RECORDS[5:], fence)
    return root / "sessions" / "a" / "journal"


def frame_starts(data: bytes) -> list[int]:
    starts, at = [], 0
    while at < len(data):
        starts.append(at)
        header = framing.parse_header(data[at : at + framing.HEADER_BYTES])
        assert header is not None
        at += header.frame_bytes
    return starts


def test_every_flipped_bit_of_a_journal_is_found(root: Path, journal: Path) -> None:
    whole = journal.read_bytes()
    for i in range(len(whole)):
        journal.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        with pytest.raises(SnapshotCorrupt):
            list(DirectoryStore(root).read("a"))
    journal.write_bytes(whole)
    assert list(DirectoryStore(root).read("a")) == RECORDS


def test_damage_stops_an_append_too(root: Path, journal: Path, fence: int) -> None:
    whole = journal.read_bytes()
    start = frame_starts(whole)[1]
    damaged = whole[: start + 5] + b"\xff" + whole[start + 6 :]
    journal.write_bytes(damaged)
    with pytest.raises(SnapshotCorrupt, match=f"byte {start}"):
        DirectoryStore(root).append("a", [b"x"], fence)
    assert journal.read_bytes() == damaged


def test_what_is_missing_in_the_middle_is_found(root: Path, journal: Path) -> None:
    whole = journal.read_bytes()
    first, second, third = frame_starts(whole)
    for damaged in (whole[:second] + whole[third:], whole[second:], whole[:third] + whole[second:third]):
        journal.write_bytes(damaged)
        with pytest.raises(SnapshotCorrupt):
            list(DirectoryStore(root).read("a"))


def test_a_torn_tail_is_cut_wherever_it_is_torn(root: Path, journal: Path, fence: int) -> None:
    whole = journal.read_bytes()
    last = frame_starts(whole)[-1]
    for end in range(last, len(whole)):
        for zeros in (0, 1, 5000):  # blocks that a power failure left unwritten read as zeros
            journal.write_bytes(whole[:end] + bytes(zeros))
            store = DirectoryStore(root)
            assert list(store.read("a")) == RECORDS[:5]
            assert store.append("a", [b"anew"], fence) == 6
            assert list(store.read("a")) == list(DirectoryStore(root).read("a")) == [*RECORDS[:5], b"anew"]


def test_a_torn_tail_may_be_longer_than_what_follows_it(
    root: Path, store: DirectoryStore, fence: int
) -> None:
    journal = root / "sessions" / "a" / "journal"
    kept = journal.read_bytes()
    store.append("a", [b"x" * 100_000], fence)
    journal.write_bytes(journal.read_bytes()[:-1])
    again = DirectoryStore(root)
    assert again.append("a", [b"short"], fence) == 2
    assert list(again.read("a")) == list(DirectoryStore(root).read("a")) == [b"made", b"short"]
    assert journal.stat().st_size < len(kept) + 100


def test_a_torn_batch_goes_as_a_whole(root: Path, journal: Path) -> None:
    whole = journal.read_bytes()
    _, second, third = frame_starts(whole)
    for end in range(second, third):
        journal.write_bytes(whole[:end])
        assert list(DirectoryStore(root).read("a")) == RECORDS[:1]


def test_an_open_store_notices_what_another_cut(root: Path, store: DirectoryStore, fence: int) -> None:
    store.append("a", [b"1"], fence)
    path = root / "sessions" / "a" / "journal"
    with path.open("ab") as file:
        file.write(b"torn")
    assert list(store.read("a")) == [b"made", b"1"]
    assert DirectoryStore(root).append("a", [b"2"], fence) == 3
    assert list(store.read("a")) == [b"made", b"1", b"2"]


def test_a_later_format_is_named(root: Path, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "VERSION", 2)
    journal.write_bytes(framing.encode(0, 1, framing.pack([b"x"])))
    monkeypatch.undo()
    with pytest.raises(SnapshotUnsupported, match="format 2"):
        list(DirectoryStore(root).read("a"))


def test_every_flipped_bit_of_a_spool_is_found(root: Path, store: DirectoryStore, fence: int) -> None:
    for at in (0, 30, 60):
        store.spool_append("a", "d", at, b"%02d" % at * 15, fence)
    path = root / "sessions" / "a" / "spool" / "d"
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 2]) + whole[i + 1 :])
        with pytest.raises(SnapshotCorrupt):
            DirectoryStore(root).spool_read("a", "d", 0, 100)


def test_every_cut_and_flip_of_a_stored_snapshot_is_found(
    root: Path, store: DirectoryStore, fence: int
) -> None:
    store.put_snapshot("a", 3, b"the state", fence)
    path = root / "sessions" / "a" / "snapshots" / "3"
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))] + [whole + b"x"]
    damaged += [whole[:i] + bytes([whole[i] ^ 64]) + whole[i + 1 :] for i in range(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        assert [ref.version for ref in store.list_snapshots("a")] == [3]
        with pytest.raises(SnapshotCorrupt):
            store.get_snapshot("a", 3)


def test_a_damaged_lease_is_an_error_not_a_free_session(
    root: Path, store: DirectoryStore, fence: int
) -> None:
    path = root / "sessions" / "a" / "lease"
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(SnapshotError):
            store.acquire("a", "other", 1)


def test_what_a_crash_left_aside_is_cleared(root: Path, store: DirectoryStore, fence: int) -> None:
    store.put_snapshot("a", 1, b"x", fence)
    # A creation that died before its last step: all of it is there but the name that makes it visible.
    store.create("b", "t", b"secret", ("half", b"value"))
    os.rename(root / "sessions" / "b", root / "aside" / "b")
    assert store.get_idempotent("half") is None
    assert store.list_sessions("t", None, 9) == ["a"]
    (root / "aside" / "probe-1").write_bytes(b"x")
    again = DirectoryStore(root)
    assert not [*(root / "aside").iterdir()]
    assert len([*(root / "idempotency").iterdir()]) == len([*(root / "tenants").glob("*/*")]) == 1
    assert again.create("b", "t", b"anew", ("half", b"value"))
    # A snapshot that was being written when its owner died.
    left = root / "sessions" / "a" / "snapshots" / "2.0123.aside"
    left.write_bytes(b"half")
    assert [ref.version for ref in again.list_snapshots("a")] == [1]
    store.release(store.acquire("a", "me", 600))
    again.acquire("a", "next", 60)
    assert not left.exists()


def test_nobody_else_can_read_it(root: Path, store: DirectoryStore, fence: int) -> None:
    before = os.umask(0)
    try:
        DirectoryStore(root / "inner")
        store.create("b", "u", b"x", ("k", b"v"))
        store.append("b", [b"x"], store.acquire("b", "me", 60).fence)
        store.put_snapshot("a", 1, b"x", fence)
        store.spool_append("a", "d", 0, b"x", fence)
    finally:
        os.umask(before)
    for path in [root, *root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def owner_of(root: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, str(WORKER), "directory", str(root), "hold", "owner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_a_dead_owners_lease_is_free_at_once(root: Path, store: DirectoryStore) -> None:
    store.create("a", "t", b"made")
    with owner_of(root) as process:
        with pytest.raises(SessionBusy):
            store.acquire("a", "next", 60)
        with pytest.raises(SessionBusy):
            store.acquire("a", "owner", 60)  # the same name isn't the same process
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent hasn't asked yet
        assert store.acquire("a", "next", 60).fence == 2


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, False),
        ({"boot": "another"}, True),
        ({"started": "1"}, True),
        ({"pid": 2**22 + 1}, True),
        ({"namespace": "pid:[1]", "pid": 2**22 + 1}, False),  # another container's: can't be told
    ],
)
def test_only_a_process_that_is_surely_gone_is_dead(
    root: Path, store: DirectoryStore, fence: int, changes: dict[str, str | int], free: bool
) -> None:
    path = root / "sessions" / "a" / "lease"
    record = lease_file.read_lease(path)
    assert record.process is not None
    process = lease_file.Process(**{**vars(record.process), **changes})
    lease_file.write_lease(path, lease_file.LeaseRecord("other", fence, record.expires_at, process))
    if free:
        assert store.acquire("a", "me", 60).fence == fence + 1
    else:
        with pytest.raises(SessionBusy):
            store.acquire("a", "me", 60)


def test_a_directory_that_is_gone_is_unavailable(root: Path, store: DirectoryStore, fence: int) -> None:
    os.rename(root, root.with_name("away"))
    calls: list[Callable[[], object]] = [
        store.check,
        lambda: store.read("a"),
        lambda: store.append("a", [b"x"], fence),
        lambda: store.exists("a"),
        lambda: store.create("b", "t", b""),
        lambda: store.list_sessions("t", None, 5),
        lambda: store.get_snapshot("a", 1),
        lambda: store.acquire("a", "me", 1),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            call()
    os.rename(root.with_name("away"), root)
    assert store.append("a", [b"x"], fence) == 2
    (root / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        DirectoryStore(root / "file")


def test_a_snapshot_of_an_owner_that_lost_the_session_meanwhile(
    root: Path, store: DirectoryStore, fence: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fence is compared when the long write is over, not only before it."""
    from mnemosyne.checkpoints import files

    write = files.write_aside

    def slow(path: Path, *parts: bytes) -> Path:
        aside = write(path, *parts)
        if path.parent.name == "snapshots":
            store.release(store.acquire("a", "me", 60))
        return aside

    monkeypatch.setattr("mnemosyne.checkpoints.directory.files.write_aside", slow)
    with pytest.raises(LeaseLost):
        store.put_snapshot("a", 1, b"x", fence)
    assert store.list_snapshots("a") == []
    assert not [*root.rglob("snapshots/*")]


def test_a_directory_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(StoreUnavailable, match=f"can't open the data directory {file}: File exists"):
        DirectoryStore(file)
