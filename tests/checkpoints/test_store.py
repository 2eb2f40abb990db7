"""What both stores promise, on both."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import (
    DocumentNotFound,
    OffsetMismatch,
    RequestError,
    SessionError,
    SessionNotFound,
    VersionNotFound,
)

Held = Callable[[str], int]
WORKER = Path(__file__).with_name("store_worker.py")
BAD_IDS = ["", ".", "..", "../x", "a/b", "a\\b", "a\0", "x" * 65, "a b", "ä", "{a}", "a*"]


def test_a_session_begins_with_its_first_record(store: SessionStore) -> None:
    store.check()
    assert not store.exists("a")
    assert store.create("a", "t", b"first")
    assert store.exists("a")
    assert list(store.read("a")) == [b"first"]
    with pytest.raises(SessionError):
        store.create("a", "t", b"again")
    assert list(store.read("a")) == [b"first"]


def test_records_come_back_as_they_were_appended(store: SessionStore, held: Held) -> None:
    fence = held("a")
    records = [b"", b"\0\0", b"x" * 300_000, os.urandom(1000), b"\n"]
    assert store.append("a", records, fence) == 6
    assert store.append("a", [], fence) == 6
    assert store.append("a", [b"last"], fence) == 7
    whole = [b"made", *records, b"last"]
    assert list(store.read("a")) == whole
    for start in range(9):
        assert list(store.read("a", start)) == whole[start:]
    assert store.journal_bytes("a") > 300_000


def test_a_second_object_sees_everything(place: Any, store: SessionStore, held: Held) -> None:
    fence = held("a")
    other = place.open()
    assert list(other.read("a")) == [b"made"]
    store.append("a", [b"1"], fence)
    assert other.append("a", [b"2"], fence) == 3
    assert store.append("a", [b"3"], fence) == 4
    assert list(other.read("a")) == list(store.read("a")) == [b"made", b"1", b"2", b"3"]


def test_many_records_and_a_reader_beside_the_writer(store: SessionStore, held: Held) -> None:
    fence = held("a")
    store.append("a", [b"%d" % i for i in range(1000)], fence)
    reader = store.read("a", 1)
    assert next(reader) == b"0"
    store.append("a", [b"later"], fence)
    assert list(reader) == [b"%d" % i for i in range(1, 1000)]


def test_an_idempotency_entry_stands_or_falls_with_its_session(store: SessionStore) -> None:
    assert store.get_idempotent("key") is None
    assert store.create("a", "t", b"1", ("key", b"\0value"))
    assert store.get_idempotent("key") == b"\0value"
    assert not store.create("b", "t", b"2", ("key", b"other"))
    assert not store.exists("b")
    assert store.get_idempotent("key") == b"\0value"
    assert store.list_sessions("t", None, 10) == ["a"]
    store.erase("a", store.acquire("a", "me", 60).fence)
    assert store.get_idempotent("key") is None
    assert store.create("c", "t", b"3", ("key", b"third"))
    assert store.get_idempotent("key") == b"third"


def test_sessions_are_listed_in_order_by_tenant(store: SessionStore) -> None:
    names = ["z", "a", "m", "B", "0"]
    for name in names:
        store.create(name, "one", b"")
        store.create(name + "-2", "two/../one", b"")
    assert store.list_sessions("one", None, 100) == names
    assert store.list_sessions("one", None, 2) == names[:2]
    assert store.list_sessions("one", "a", 2) == names[2:4]
    assert store.list_sessions("one", "0", 2) == []
    assert store.list_sessions("one", None, 0) == []
    assert store.list_sessions("nobody", None, 5) == []
    for unknown in ("a-2", "never"):  # another tenant's, and nobody's: no difference
        with pytest.raises(RequestError) as caught:
            store.list_sessions("one", unknown, 5)
        assert caught.value.param == "after"


@pytest.mark.parametrize("bad", BAD_IDS)
def test_a_name_never_leaves_its_place(store: SessionStore, held: Held, bad: str) -> None:
    fence = held("a")
    with pytest.raises(RequestError):
        store.create(bad, "t", b"")
    assert not store.exists(bad)
    calls: list[Callable[[], object]] = [
        lambda: store.read(bad),
        lambda: store.append(bad, [b"x"], fence),
        lambda: store.acquire(bad, "me", 1),
        lambda: store.erase(bad, fence),
        lambda: store.stored_bytes(bad),
        lambda: store.put_snapshot(bad, 1, b"", fence),
        lambda: store.get_snapshot(bad, 1),
        lambda: store.list_snapshots(bad),
        lambda: store.spool_length(bad, "d"),
    ]
    for call in calls:
        with pytest.raises(SessionNotFound):
            call()
    for call in (
        lambda: store.spool_append("a", bad, 0, b"x", fence),
        lambda: store.spool_read("a", bad, 0, 1),
        lambda: store.spool_length("a", bad),
        lambda: store.spool_delete("a", bad, fence),
    ):
        with pytest.raises(DocumentNotFound):
            call()


def test_what_was_never_made_is_not_found(store: SessionStore) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.read("no"),
        lambda: store.append("no", [b"x"], 1),
        lambda: store.journal_bytes("no"),
        lambda: store.acquire("no", "me", 1),
        lambda: store.erase("no", 1),
        lambda: store.stored_bytes("no"),
        lambda: store.put_snapshot("no", 1, b"x", 1),
        lambda: store.get_snapshot("no", 1),
        lambda: store.list_snapshots("no"),
        lambda: store.delete_snapshot("no", 1, 1),
        lambda: store.spool_append("no", "d", 0, b"x", 1),
        lambda: store.spool_length("no", "d"),
        lambda: store.spool_read("no", "d", 0, 1),
        lambda: store.spool_delete("no", "d", 1),
    ]
    for call in calls:
        with pytest.raises(SessionNotFound):
            call()


def test_snapshots(store: SessionStore, held: Held) -> None:
    fence = held("a")
    assert store.list_snapshots("a") == []
    data = {7: os.urandom(9_000_001), 12: b"", 100: b"x" * 4_000_000}
    refs = [store.put_snapshot("a", version, data[version], fence) for version in (100, 7, 12)]
    assert store.list_snapshots("a") == sorted(refs, key=lambda ref: ref.version)
    assert [ref.nbytes for ref in store.list_snapshots("a")] == [9_000_001, 0, 4_000_000]
    for version, content in data.items():
        assert store.get_snapshot("a", version) == content
    store.put_snapshot("a", 7, b"anew", fence)
    assert store.get_snapshot("a", 7) == b"anew"
    store.delete_snapshot("a", 12, fence)
    store.delete_snapshot("a", 12, fence)
    assert [ref.version for ref in store.list_snapshots("a")] == [7, 100]
    for version in (12, 3, -1):
        with pytest.raises(VersionNotFound):
            store.get_snapshot("a", version)


def test_a_spool_grows_at_its_end_alone(store: SessionStore, held: Held) -> None:
    fence = held("a")
    whole = os.urandom(9_000_000)
    assert store.spool_length("a", "d") == 0
    assert store.spool_read("a", "d", 0, 10) == b""
    with pytest.raises(OffsetMismatch) as caught:
        store.spool_append("a", "d", 5, b"x", fence)
    assert caught.value.attributes["offset"] == 0
    assert store.spool_append("a", "d", 0, b"", fence) == 0
    cuts = [0, 1, 10, 3_999_999, 4_000_000, 4_000_001, 9_000_000]
    for start, end in zip(cuts, cuts[1:], strict=False):
        assert store.spool_append("a", "d", start, whole[start:end], fence) == end
        assert store.spool_length("a", "d") == end
    for offset in (0, 8_999_999, 9_000_001):
        with pytest.raises(OffsetMismatch) as caught:
            store.spool_append("a", "d", offset, b"again", fence)
        assert caught.value.attributes["offset"] == 9_000_000
    assert store.spool_append("a", "d", 9_000_000, b"", fence) == 9_000_000
    for offset, length in ((0, 9_000_000), (3_999_998, 5), (8_999_999, 100), (9_000_000, 1), (5, 0), (10, 1)):
        assert store.spool_read("a", "d", offset, length) == whole[offset : offset + length]
    store.spool_append("a", "other", 0, b"abc", fence)
    store.spool_delete("a", "d", fence)
    store.spool_delete("a", "d", fence)
    assert (store.spool_length("a", "d"), store.spool_read("a", "d", 0, 5)) == (0, b"")
    assert store.spool_append("a", "d", 0, b"anew", fence) == 4
    assert store.spool_read("a", "d", 0, 9) == b"anew"
    assert store.spool_read("a", "other", 0, 9) == b"abc"


def test_erasing_leaves_nothing(place: Any, store: SessionStore, held: Held) -> None:
    secret = b"a secret that must go"
    store.create("kept", "tenant", b"kept")
    fence = held("gone")
    store.append("gone", [secret], fence)
    store.put_snapshot("gone", 1, secret * 200_000, fence)
    store.spool_append("gone", "d", 0, secret, fence)
    assert store.stored_bytes("gone") > 200_000 * len(secret)
    receipt = store.erase("gone", fence)
    assert receipt["snapshots"] == 1 and receipt["snapshot_bytes"] >= 200_000 * len(secret)
    assert receipt["journal_bytes"] >= len(secret) and receipt["spool_bytes"] >= len(secret)
    assert not store.exists("gone")
    assert store.list_sessions("tenant", None, 5) == ["kept"]
    with pytest.raises(SessionNotFound):
        store.append("gone", [b"x"], fence)
    if place.kind == "directory":
        left = [path for path in Path(place.where).rglob("*") if "gone" in path.name]
        texts = [path.read_bytes() for path in Path(place.where).rglob("*") if path.is_file()]
        assert not left and not any(secret in text for text in texts)
    else:
        import redis

        with redis.Redis.from_url(place.where) as client:
            assert list(client.scan_iter("*gone*")) == []
            assert client.zscore([*client.scan_iter("*tenant:*")][0], "gone") is None


def test_threads_of_one_owner_lose_nothing(store: SessionStore, held: Held) -> None:
    fence = held("a")
    lengths: list[int] = []

    def write(name: int) -> None:
        for i in range(10):
            lengths.append(store.append("a", [b"%d %d" % (name, i)], fence))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lengths) == list(range(2, 42))
    records = list(store.read("a", 1))
    for name in range(4):
        assert [r for r in records if r.startswith(b"%d " % name)] == [
            b"%d %d" % (name, i) for i in range(10)
        ]
