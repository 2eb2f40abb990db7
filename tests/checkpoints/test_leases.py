"""One writer at a time, on both stores: leases, fences, and what a stale owner can't do."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import LeaseLost, SessionBusy

WORKER = Path(__file__).with_name("store_worker.py")


def test_a_lease_is_one_owners(store: SessionStore) -> None:
    store.create("a", "t", b"")
    first = store.acquire("a", "one", 30)
    assert abs(first.expires_at - time.time() - 30) < 5
    renewed = store.acquire("a", "one", 60)
    assert renewed.fence == first.fence and renewed.expires_at > first.expires_at
    with pytest.raises(SessionBusy) as caught:
        store.acquire("a", "two", 30)
    wait = caught.value.attributes["retry_after"]
    assert isinstance(wait, int | float) and 50 < wait <= 60
    store.release(renewed)
    store.release(renewed)
    second = store.acquire("a", "two", 30)
    assert second.fence > first.fence
    store.release(first)  # stale: nothing happens
    with pytest.raises(SessionBusy):
        store.acquire("a", "one", 30)


def test_a_lease_that_ran_out_is_kept_until_someone_takes_it(store: SessionStore) -> None:
    store.create("a", "t", b"")
    first = store.acquire("a", "one", 0.05)
    time.sleep(0.1)
    assert store.append("a", [b"late, but nobody else's"], first.fence) == 2
    assert store.acquire("a", "one", 0.05).fence == first.fence
    time.sleep(0.1)
    assert store.acquire("a", "two", 30).fence > first.fence


def test_a_stale_owner_writes_nothing(store: SessionStore) -> None:
    store.create("a", "t", b"made")
    stale = store.acquire("a", "one", 0.01).fence
    store.put_snapshot("a", 1, b"one", stale)
    store.spool_append("a", "d", 0, b"one", stale)
    time.sleep(0.05)
    fence = store.acquire("a", "two", 30).fence
    for wrong in (stale, fence + 1, 0, -1):
        for call in (
            lambda f=wrong: store.append("a", [b"x"], f),
            lambda f=wrong: store.put_snapshot("a", 2, b"x", f),
            lambda f=wrong: store.delete_snapshot("a", 1, f),
            lambda f=wrong: store.spool_append("a", "d", 3, b"x", f),
            lambda f=wrong: store.spool_delete("a", "d", f),
            lambda f=wrong: store.erase("a", f),
        ):
            with pytest.raises(LeaseLost):
                call()
    assert list(store.read("a")) == [b"made"]
    assert [ref.version for ref in store.list_snapshots("a")] == [1]
    assert store.spool_read("a", "d", 0, 10) == b"one"
    assert store.append("a", [b"y"], fence) == 2


def test_nobody_writes_without_a_lease(store: SessionStore) -> None:
    store.create("a", "t", b"made")
    with pytest.raises(LeaseLost):
        store.append("a", [b"x"], 0)
    lease = store.acquire("a", "one", 30)
    store.release(lease)
    with pytest.raises(LeaseLost):
        store.append("a", [b"x"], lease.fence)
    assert list(store.read("a")) == [b"made"]


def test_processes_that_race_for_a_lease_never_write_together(place: Any, store: SessionStore) -> None:
    store.create("a", "t", b"made")
    command = [sys.executable, str(WORKER), place.kind, place.where, "race"]
    racers = [
        subprocess.Popen([*command, f"owner-{i}"], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
        for i in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == b"ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.close()  # all go at once
    for racer in racers:
        assert racer.stdout is not None
        racer.stdout.read()
        racer.stdout.close()
        assert racer.wait(30) == 0
    turns = [re.fullmatch(rb"(\S+) (\d+) (begin|end)", record) for record in store.read("a", 1)]
    seen: list[tuple[bytes, int]] = []
    for begin, end in zip(turns[::2], turns[1::2], strict=True):
        assert begin is not None and end is not None
        assert (begin[1], begin[2], begin[3], end[3]) == (end[1], end[2], b"begin", b"end")
        seen.append((begin[1], int(begin[2])))
    assert len(seen) == 3 * 8
    assert {owner for owner, _ in seen} == {b"owner-0", b"owner-1", b"owner-2"}
    fences = [fence for _, fence in seen]
    assert fences == sorted(set(fences)), "every turn has a fence of its own, and they rise"
