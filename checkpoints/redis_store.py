"""Sessions in Redis, shared by replicas. Owns the keys; knows no tensor and no record's meaning.

    mnemosyne:{<id>}:session                             how it was made, and the lease (redis_scripts)
    mnemosyne:{<id>}:journal                             list of records: token of the append, CRC-32, payload
    mnemosyne:{<id>}:snapshots                           version -> token, number of pieces, bytes, SHA-256
    mnemosyne:{<id>}:snapshot:<version>:<token>:<n>      a piece
    mnemosyne:{<id>}:spools                              document -> bytes that count
    mnemosyne:{<id>}:spool:<document>:<n>                a piece
    mnemosyne:{<id>}:pieces                              names of all pieces, also of writes that came to
    nothing mnemosyne:tenant:<hash>                              ids by the order in which they were made
    mnemosyne:idempotency:<hash>                         the value given with a creation mnemosyne:sequence

A session's keys lie in one slot; making and erasing one also touch the last three, and so need one server.
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from mnemosyne.checkpoints import redis_scripts as scripts
from mnemosyne.checkpoints.names import hashed, is_id
from mnemosyne.checkpoints.redis_link import RedisLink
from mnemosyne.checkpoints.redis_snapshots import RedisSnapshots
from mnemosyne.checkpoints.redis_spool import RedisSpool
from mnemosyne.checkpoints.redis_writer import Doubt, RedisWriter
from mnemosyne.checkpoints.store import Lease
from mnemosyne.engine.errors import RequestError, SessionBusy, SessionError, SessionNotFound, SnapshotCorrupt

IDEMPOTENCY_SECONDS = 24 * 3600
_TOKEN_BYTES = 8
_CHECK_BYTES = 4
_READ_AT_ONCE = 64


class RedisStore(RedisSnapshots):
    """``SessionStore`` on one Redis 6.2 or later. Safe for threads; processes share a server through leases.

    What is acknowledged is as durable as the server makes it: ``appendonly yes`` and ``appendfsync always``,
    else ``check`` warns. Erased bytes stay in the append-only file until Redis rewrites it.
    """

    def __init__(
        self, url: str, *, timeout: float = 5.0, connect_timeout: float = 1.0, prefix: str = "mnemosyne:"
    ) -> None:
        """Doesn't connect: a Redis that is away now may come. Times in seconds. Raises ConfigError."""
        super().__init__(RedisWriter(RedisLink(url, timeout, connect_timeout), prefix))
        self._spool = RedisSpool(self._writer)
        self._key = self._writer.key
        self._prefix = prefix

    def check(self) -> None:
        self._link.check(self._prefix + "check")

    def close(self) -> None:
        self._link.close()

    def create(
        self, session_id: str, tenant: str, first: bytes, idempotency: tuple[str, bytes] | None = None
    ) -> bool:
        if not is_id(session_id):
            raise RequestError("a session id is 1 to 64 of 0-9 a-z A-Z _ -", param="session_id")
        key, value = (hashed(idempotency[0]), idempotency[1]) if idempotency is not None else ("", b"")
        keys = [
            self._key(session_id, "session"),
            self._key(session_id, "journal"),
            self._tenant(hashed(tenant)),
            self._prefix + "sequence",
            self._idempotency(key),
        ]
        call, record = secrets.token_hex(_TOKEN_BYTES), _seal(os.urandom(_TOKEN_BYTES), first)
        args = [call, session_id, hashed(tenant), record, key, value, IDEMPOTENCY_SECONDS]
        answer = self._link.run_again(scripts.CREATE, keys, args)
        if answer[0] == b"exists":
            raise SessionError("a session of this id exists")
        return bool(answer[0] == b"ok")

    def get_idempotent(self, key: str) -> bytes | None:
        value: bytes | None = self._link.ask(lambda r: r.hget(self._idempotency(hashed(key)), "value"))
        return value

    def exists(self, session_id: str) -> bool:
        if not is_id(session_id):
            return False
        return bool(self._link.ask(lambda r: r.exists(self._key(session_id, "session"))))

    def list_sessions(self, tenant: str, after: str | None, limit: int) -> list[str]:
        key, start = self._tenant(hashed(tenant)), "-inf"
        if after is not None:
            score: float | None = self._link.ask(lambda r: r.zscore(key, after))
            if score is None:
                raise RequestError("no such session to list after", param="after")
            start = f"({score:.0f}"
        # Redis takes a negative number for no limit.
        ids = self._link.ask(lambda r: r.zrangebyscore(key, start, "+inf", start=0, num=max(0, limit)))
        return [session_id.decode() for session_id in ids]

    def erase(self, session_id: str, fence: int) -> dict[str, int]:
        session = self._key(session_id, "session")
        with self._writer.settled(session_id):
            sizes = self._sizes(session_id)
            tenant, key = self._link.ask(lambda r: r.hmget(session, "tenant", "idempotency"))
            names = ("journal", "snapshots", "spools", "pieces")
            keys = [*(self._key(session_id, name) for name in names), self._tenant((tenant or b"").decode())]
            keys.append(self._idempotency((key or b"").decode()))
            # It existed a moment ago: where it doesn't now, the answer to the first try was lost.
            with suppress(SessionNotFound):
                self._writer.write(session_id, scripts.ERASE, fence, keys, [session_id])
        return sizes

    def stored_bytes(self, session_id: str) -> int:
        sizes = self._sizes(session_id)
        return sizes["journal_bytes"] + sizes["snapshot_bytes"] + sizes["spool_bytes"]

    def append(self, session_id: str, records: Sequence[bytes], fence: int) -> int:
        token = os.urandom(_TOKEN_BYTES)
        sealed = [_seal(token, record) for record in records]
        keys = [self._key(session_id, "journal")]
        return int(
            self._writer.write(session_id, scripts.APPEND, fence, keys, sealed, Doubt(fence, token))[1]
        )

    def read(self, session_id: str, start: int = 0) -> Iterator[bytes]:
        journal = self._key(session_id, "journal")
        self._writer.settle(session_id)
        length: int = self._link.ask(lambda r: r.llen(journal))
        if length == 0:
            raise SessionNotFound("no such session")
        return self._records(journal, start, length)

    def journal_bytes(self, session_id: str) -> int:
        return self._sizes(session_id)["journal_bytes"]

    def spool_append(self, session_id: str, document_id: str, offset: int, data: bytes, fence: int) -> int:
        return self._spool.append(session_id, document_id, offset, data, fence)

    def spool_length(self, session_id: str, document_id: str) -> int:
        return self._spool.length(session_id, document_id)

    def spool_read(self, session_id: str, document_id: str, offset: int, length: int) -> bytes:
        return self._spool.read(session_id, document_id, offset, length)

    def spool_delete(self, session_id: str, document_id: str, fence: int) -> None:
        self._spool.delete(session_id, document_id, fence)

    def acquire(self, session_id: str, owner: str, ttl_seconds: float) -> Lease:
        if not owner:
            raise ValueError("a lease needs an owner")
        keys, args = [self._key(session_id, "session")], [owner, round(ttl_seconds * 1000)]
        with self._writer.settled(session_id):
            answer = self._link.run_again(scripts.ACQUIRE, keys, args)
        if answer[0] == b"missing":
            raise SessionNotFound("no such session")
        if answer[0] == b"busy":
            raise SessionBusy("another writer holds the session", retry_after=int(answer[1]) / 1000)
        return Lease(session_id, owner, int(answer[1]), int(answer[2]) / 1000)

    def release(self, lease: Lease) -> None:
        """Let go of the session; nothing happens where it is another's by now."""
        keys = [self._key(lease.session_id, "session")]
        with self._writer.settled(lease.session_id):
            self._link.run_again(scripts.RELEASE, keys, [lease.owner, lease.fence])

    def _tenant(self, name: str) -> str:
        return f"{self._prefix}tenant:{name}"

    def _idempotency(self, name: str) -> str:
        return f"{self._prefix}idempotency:{name}"

    def _sizes(self, session_id: str) -> dict[str, int]:
        """Bytes by kind, for a receipt."""
        self._writer.settle(session_id)
        session, spools = self._key(session_id, "session"), self._key(session_id, "spools")

        def look(client: Any) -> tuple[bytes | None, list[bytes]]:
            return client.hget(session, "journal_bytes"), client.hvals(spools)

        journal, lengths = self._link.ask(look)
        if journal is None:
            raise SessionNotFound("no such session")
        snapshots = self.list_snapshots(session_id)
        return {
            "journal_bytes": int(journal),
            "snapshots": len(snapshots),
            "snapshot_bytes": sum(ref.nbytes for ref in snapshots),
            "spool_bytes": sum(int(length) for length in lengths),
        }

    def _records(self, journal: str, start: int, end: int) -> Iterator[bytes]:
        for first in range(start, end, _READ_AT_ONCE):
            last = min(end, first + _READ_AT_ONCE) - 1
            sealed = self._range(journal, first, last)
            if first == start and not sealed:
                raise SessionNotFound("no such session")
            for number, record in enumerate(sealed, first):
                yield _unseal(record, number)

    def _range(self, journal: str, first: int, last: int) -> list[bytes]:
        records: list[bytes] = self._link.ask(lambda r: r.lrange(journal, first, last))
        return records


def _seal(token: bytes, record: bytes) -> bytes:
    return token + zlib.crc32(record).to_bytes(_CHECK_BYTES, "little") + record


def _unseal(sealed: bytes, number: int) -> bytes:
    """Raises SnapshotCorrupt."""
    start = _TOKEN_BYTES + _CHECK_BYTES
    record = sealed[start:]
    if sealed[_TOKEN_BYTES:start] != zlib.crc32(record).to_bytes(_CHECK_BYTES, "little"):
        raise SnapshotCorrupt(f"the journal is corrupt at record {number}", record=number)
    return record
