"""``kill -9`` at any moment: what was acknowledged is there, and nothing is half there."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnemosyne.checkpoints.store import SessionStore

WORKER = Path(__file__).with_name("store_worker.py")


@contextmanager
def worker(place: Any, mode: str, owner: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(WORKER), place.kind, place.where, mode, owner]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run_for(process: subprocess.Popen[bytes], lines: int) -> list[bytes]:
    """Wait until it acknowledged that many writes; returns what it said."""
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(lines)]


def acknowledged(process: subprocess.Popen[bytes], said: list[bytes]) -> dict[str, int]:
    """The last number said for each kind of write, once the process is dead."""
    assert process.stdout is not None
    rest = process.stdout.read()
    return {
        word: int(number)
        for word, _, number in (
            line.decode().partition(" ") for line in b"".join([*said, rest]).split(b"\n")[:-1]
        )
    }


def check(store: SessionStore, said: dict[str, int]) -> None:
    """Everything acknowledged is there, and what is there is whole."""
    records = list(store.read("a"))
    assert len(records) >= said["append"]
    i = 1
    while i < len(records):  # whole batches only, in order, as they were written
        batch = records[i : i + 1 + i % 3]
        assert batch == [b"%d:" % (i + n) + bytes([i % 251]) * (1 + i * 37 % 9000) for n in range(1 + i % 3)]
        i += len(batch)
    length = store.spool_length("a", "d")
    assert length >= said["spool"]
    spool, at = store.spool_read("a", "d", 0, length), 0
    while at < length:
        digest = hashlib.sha256(b"%d" % at).digest()
        assert spool[at : at + 32] == digest
        while spool[at : at + 32] == digest:
            at += 32
    versions = [ref.version for ref in store.list_snapshots("a")]
    assert max(versions) >= said["snapshot"]
    assert len(versions) <= 10 and said["delete"] not in versions
    for version in versions:
        assert store.get_snapshot("a", version) == b"%d" % version * 50_000


def test_a_killed_writer(place: Any, store: SessionStore) -> None:
    store.create("a", "t", b"made")
    dice = random.Random(20261122)
    for round_ in range(5):
        with worker(place, "write", f"owner-{round_}") as process:
            said = run_for(process, 25)
            time.sleep(dice.random() * 0.2)
            process.kill()
            # Its files are closed a moment before it is dead.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            check(place.open(), acknowledged(process, said))
            if place.kind == "redis":
                expire(place)
            # A directory knows that the owner is dead, even one that its parent hasn't waited for.
            store.release(store.acquire("a", "next", 60))


def expire(place: Any) -> None:
    """Let the lease of a killed owner run out: Redis can't see that its process is gone."""
    import redis

    with redis.Redis.from_url(place.where) as client:
        client.hset("mnemosyne:{a}:session", "expires", 0)


def test_a_killed_redis(redis_place: Any, redis_server: Any) -> None:
    store = redis_place.open()
    store.create("a", "t", b"made")
    for round_ in range(3):
        with worker(redis_place, "write", f"owner-{round_}") as process:
            said = run_for(process, 25)
            redis_server.kill()
            assert process.wait(30) != 0
            last = acknowledged(process, said)
        redis_server.start()
        check(store, last)
        expire(redis_place)


def test_an_owner_that_slept_comes_back_too_late(place: Any, store: SessionStore) -> None:
    store.create("a", "t", b"made")
    with worker(place, "sleep", "sleeper") as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"asleep\n"
        fence = store.acquire("a", "thief", 60).fence
        store.append("a", [b"the thief's"], fence)
        process.stdin.close()
        assert process.stdout.readline() == b"LeaseLost\n"
    assert list(store.read("a")) == [b"made", b"the sleeper's", b"the thief's"]
