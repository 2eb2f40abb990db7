"""A process of its own that uses a store: python store_worker.py KIND WHERE MODE OWNER.

It says on standard output what was acknowledged, one line each, after the call came back.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.checkpoints.redis_store import RedisStore
from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import LeaseLost, SessionBusy


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def race(store: SessionStore, owner: str) -> None:
    """Eight turns of two records each, whenever the lease can be had."""
    say("ready")
    sys.stdin.read()
    turns = 0
    while turns < 8:
        try:
            lease = store.acquire("a", owner, 60)
        except SessionBusy:
            time.sleep(0.002)
            continue
        for word in ("begin", "end"):
            store.append("a", [f"{owner} {lease.fence} {word}".encode()], lease.fence)
        store.release(lease)
        turns += 1


def write(store: SessionStore, owner: str) -> None:
    """Append, spool and save without end, until killed."""
    fence = store.acquire("a", owner, 60).fence
    i = store.append("a", [], fence)
    offset = store.spool_length("a", "d")
    while True:
        batch = [b"%d:" % (i + n) + bytes([i % 251]) * (1 + i * 37 % 9000) for n in range(1 + i % 3)]
        i = store.append("a", batch, fence)
        say(f"append {i}")
        data = hashlib.sha256(b"%d" % offset).digest() * (1 + i * 7 % 300)
        offset = store.spool_append("a", "d", offset, data, fence)
        say(f"spool {offset}")
        store.put_snapshot("a", i, b"%d" % i * 50_000, fence)
        say(f"snapshot {i}")
        kept = [ref.version for ref in store.list_snapshots("a")]
        if len(kept) > 3:
            store.delete_snapshot("a", kept[0], fence)
            say(f"delete {kept[0]}")


def sleep(store: SessionStore, owner: str) -> None:
    """Write once, let the lease run out, and try to write again."""
    lease = store.acquire("a", owner, 0.05)
    store.append("a", [f"the {owner}'s".encode()], lease.fence)
    time.sleep(0.1)
    say("asleep")
    sys.stdin.read()
    try:
        store.append("a", [b"too late"], lease.fence)
    except LeaseLost as error:
        say(type(error).__name__)


def hold(store: SessionStore, owner: str) -> None:
    """Own the session and do nothing, until killed."""
    store.acquire("a", owner, 600)
    say("held")
    sys.stdin.read()


def main() -> None:
    kind, where, mode, owner = sys.argv[1:]
    store: SessionStore = DirectoryStore(where) if kind == "directory" else RedisStore(where)
    {"race": race, "write": write, "sleep": sleep, "hold": hold}[mode](store, owner)
    store.close()


if __name__ == "__main__":
    main()
