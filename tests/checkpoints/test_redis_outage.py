"""A Redis that is gone, stuck, full or read-only, and lines that break at the worst moment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from mnemosyne.checkpoints import redis_scripts
from mnemosyne.checkpoints.redis_store import RedisStore
from mnemosyne.checkpoints.redis_writer import RedisWriter
from mnemosyne.engine.errors import ConfigError, OffsetMismatch, SnapshotCorrupt, StoreUnavailable


@pytest.fixture
def client(redis_server: Any) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
def store(redis_server: Any) -> Iterator[RedisStore]:
    store = RedisStore(redis_server.url, timeout=0.3, connect_timeout=0.3)
    yield store
    store.close()


@pytest.fixture
def fence(store: RedisStore) -> int:
    store.create("a", "t", b"made")
    return store.acquire("a", "me", 600).fence


def writes(store: RedisStore, fence: int) -> list[Callable[[], object]]:
    return [
        lambda: store.append("a", [b"x"], fence),
        lambda: store.spool_append("a", "d", 0, b"x", fence),
        lambda: store.put_snapshot("a", 1, b"x", fence),
        lambda: store.create("b", "t", b"x", ("key", b"value")),
        lambda: store.acquire("a", "me", 60),
        store.check,
    ]


def nothing_happened(store: RedisStore) -> None:
    assert list(store.read("a")) == [b"made"]
    assert store.spool_length("a", "d") == 0
    assert store.list_snapshots("a") == []
    assert not store.exists("b") and store.get_idempotent("key") is None


def test_a_redis_that_is_gone_and_comes_back(store: RedisStore, fence: int, redis_server: Any) -> None:
    redis_server.kill()
    reads: list[Callable[[], object]] = [
        lambda: list(store.read("a")),
        lambda: store.get_snapshot("a", 1),
        lambda: store.exists("a"),
        lambda: store.list_sessions("t", None, 5),
        lambda: store.spool_length("a", "d"),
        lambda: store.get_idempotent("key"),
    ]
    for call in writes(store, fence) + reads:
        with pytest.raises(StoreUnavailable):
            call()
    redis_server.start()
    nothing_happened(store)
    for call in writes(store, fence):
        call()
    assert list(store.read("a")) == [b"made", b"x"]


def test_a_store_may_be_made_before_its_redis(redis_server: Any) -> None:
    redis_server.kill()
    store = RedisStore(redis_server.url)
    with pytest.raises(StoreUnavailable):
        store.check()
    redis_server.start()
    store.check()
    store.close()


def test_a_restart_between_two_calls_is_not_seen(store: RedisStore, fence: int, redis_server: Any) -> None:
    redis_server.kill()
    redis_server.start()
    assert store.append("a", [b"x"], fence) == 2


def test_a_full_redis(store: RedisStore, fence: int, client: redis.Redis) -> None:
    client.config_set("maxmemory", "1")
    for call in writes(store, fence):
        with pytest.raises(StoreUnavailable):
            call()
    nothing_happened(store)
    client.config_set("maxmemory", "0")
    for call in writes(store, fence):
        call()


def test_a_redis_that_became_a_replica(store: RedisStore, fence: int, client: redis.Redis) -> None:
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    for call in writes(store, fence):
        with pytest.raises(StoreUnavailable):
            call()
    client.execute_command("REPLICAOF", "NO", "ONE")
    nothing_happened(store)
    assert store.append("a", [b"x"], fence) == 2


def test_a_redis_that_refuses_a_command(store: RedisStore, fence: int, client: redis.Redis) -> None:
    client.acl_setuser("default", enabled=True, categories=["+@all"], commands=["-rpush", "-setrange"])
    for call in (
        lambda: store.append("a", [b"x"], fence),
        lambda: store.spool_append("a", "d", 0, b"x", fence),
    ):
        with pytest.raises(StoreUnavailable):
            call()
    client.acl_setuser("default", enabled=True, categories=["+@all"])
    nothing_happened(store)


def test_it_is_said_when_answers_outrun_the_disk(
    store: RedisStore, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        store.check()
        assert caplog.text == ""
        other = RedisStore(f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}")
        client.config_set("appendfsync", "everysec")
        other.check()
        other.check()
        other.close()
    assert caplog.text.count("appendfsync everysec") == 1


def test_a_damaged_record_or_snapshot_is_refused(store: RedisStore, fence: int, client: Any) -> None:
    store.append("a", [b"one", b"two", b"three"], fence)
    sealed = client.lindex("mnemosyne:{a}:journal", 2)
    client.lset("mnemosyne:{a}:journal", 2, sealed[:-1] + bytes([sealed[-1] ^ 4]))
    reader = store.read("a")
    assert (next(reader), next(reader)) == (b"made", b"one")
    with pytest.raises(SnapshotCorrupt, match="record 2"):
        next(reader)
    store.put_snapshot("a", 1, b"x" * 5_000_000, fence)
    (piece,) = client.scan_iter("*snapshot:1:*:1")
    client.setrange(piece, 500, b"y")
    with pytest.raises(SnapshotCorrupt):
        store.get_snapshot("a", 1)
    client.delete(piece)
    with pytest.raises(SnapshotCorrupt):
        store.get_snapshot("a", 1)
    store.put_snapshot("a", 1, b"anew", fence)
    assert store.get_snapshot("a", 1) == b"anew"


def test_a_replaced_snapshot_leaves_no_piece(store: RedisStore, fence: int, client: redis.Redis) -> None:
    for fill in (b"1", b"2"):
        store.put_snapshot("a", 1, fill * 9_000_000, fence)
        pieces = {*client.scan_iter("*snapshot:1:*")}
        assert len(pieces) == 3 and pieces == client.smembers("mnemosyne:{a}:pieces")
        assert all(client.ttl(piece) == -1 and client.strlen(piece) <= 4_000_000 for piece in pieces)
    store.delete_snapshot("a", 1, fence)
    assert [*client.scan_iter("*snapshot:1:*")] == [] and not client.exists("mnemosyne:{a}:pieces")


def test_a_snapshot_whose_pieces_went_is_never_pointed_to(
    store: RedisStore, fence: int, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces last an hour unless something points to them; a writer may have slept longer."""
    store.put_snapshot("a", 1, b"the old one", fence)
    old = {*client.scan_iter("*snapshot:1:*")}
    write = RedisWriter.write

    def late(self: RedisWriter, session_id: str, script: str, *args: Any) -> Any:
        if script == redis_scripts.POINT:
            client.delete(*({*client.scan_iter("*snapshot:1:*")} - old))
        return write(self, session_id, script, *args)

    monkeypatch.setattr(RedisWriter, "write", late)
    with pytest.raises(StoreUnavailable):
        store.put_snapshot("a", 1, b"the new one", fence)
    assert store.get_snapshot("a", 1) == b"the old one"


def test_bytes_past_the_length_of_a_spool_are_not_seen(
    store: RedisStore, fence: int, client: redis.Redis
) -> None:
    """A writer that died between two pieces of one append."""
    store.spool_append("a", "d", 0, b"abc", fence)
    client.setrange("mnemosyne:{a}:spool:d:0", 3, b"left behind")
    assert store.spool_read("a", "d", 0, 100) == b"abc"
    with pytest.raises(OffsetMismatch):
        store.spool_append("a", "d", 14, b"x", fence)
    assert store.spool_append("a", "d", 3, b"def", fence) == 6
    assert store.spool_read("a", "d", 0, 100) == b"abcdef"


def test_the_keys_of_a_session_share_a_slot(store: RedisStore, fence: int, client: redis.Redis) -> None:
    store.spool_append("a", "d", 0, b"x", fence)
    store.put_snapshot("a", 1, b"x", fence)
    names = {key.decode() for key in client.scan_iter("*")}
    others = {name for name in names if "{a}" not in name}
    assert others == {name for name in names if name.split(":")[1] in ("sequence", "tenant", "check")}
    assert len(names - others) == 7


@pytest.mark.parametrize("url", ["", "http://127.0.0.1", "127.0.0.1:6379"])
def test_what_is_no_url_of_a_redis(url: str) -> None:
    with pytest.raises(ConfigError):
        RedisStore(url)
