"""Snapshots in Redis: pieces under names of their own, then one pointer. Knows no tensor."""

from __future__ import annotations

import hashlib
import secrets

from mnemosyne.checkpoints import redis_scripts as scripts
from mnemosyne.checkpoints.names import version_name
from mnemosyne.checkpoints.redis_writer import RedisWriter
from mnemosyne.checkpoints.store import SnapshotRef
from mnemosyne.engine.errors import SessionNotFound, SnapshotCorrupt, StoreUnavailable, VersionNotFound

PIECE_BYTES = 4_000_000
_UNPOINTED_SECONDS = 3600
"""How long a piece lasts whose snapshot never became whole."""


class RedisSnapshots:
    """``SnapshotStore`` on Redis."""

    def __init__(self, writer: RedisWriter) -> None:
        self._writer = writer
        self._link = writer.link

    def put_snapshot(self, session_id: str, version: int, data: bytes, fence: int) -> SnapshotRef:
        key, write, name = self._writer.key, self._writer.write, version_name(version)
        token, digest = secrets.token_hex(8), hashlib.sha256(data).hexdigest()
        snapshots, pieces = key(session_id, "snapshots"), key(session_id, "pieces")
        base = key(session_id, "snapshot")
        names = [_piece(base, name, token, i) for i in range(-(-len(data) // PIECE_BYTES))]
        for i, piece in enumerate(names):
            part = data[i * PIECE_BYTES : (i + 1) * PIECE_BYTES]
            write(session_id, scripts.PIECE, fence, [pieces, piece], [part, _UNPOINTED_SECONDS])
        pointer = f"{token} {len(names)} {len(data)} {digest}"
        keys = [snapshots, pieces, *names]
        if write(session_id, scripts.POINT, fence, keys, [name, pointer, base])[0] == b"gone":
            raise StoreUnavailable("Redis dropped pieces of a snapshot while it was written")
        return SnapshotRef(session_id, version, len(data), digest)

    def get_snapshot(self, session_id: str, version: int) -> bytes:
        name = version_name(version)
        snapshots = self._writer.key(session_id, "snapshots")
        base = self._writer.key(session_id, "snapshot")
        pointer: bytes | None = None
        while True:
            before = pointer
            pointer = self._link.ask(lambda r: r.hget(snapshots, name))
            if pointer is None:
                self._need_session(session_id)
                raise VersionNotFound(f"no snapshot of version {version}")
            token, count, ref = _pointed(session_id, version, pointer)
            data = b"".join(self._piece(_piece(base, name, token, i)) for i in range(count))
            if len(data) == ref.nbytes and hashlib.sha256(data).hexdigest() == ref.sha256:
                return data
            # Another snapshot may have taken its place while the pieces were read; the same one is damaged.
            if pointer == before:
                raise SnapshotCorrupt(f"the stored snapshot of version {version} is corrupt")

    def list_snapshots(self, session_id: str) -> list[SnapshotRef]:
        snapshots = self._writer.key(session_id, "snapshots")
        found: dict[bytes, bytes] = self._link.ask(lambda r: r.hgetall(snapshots))
        if not found:
            self._need_session(session_id)
        return sorted(
            (_pointed(session_id, int(version), pointer)[2] for version, pointer in found.items()),
            key=lambda ref: ref.version,
        )

    def delete_snapshot(self, session_id: str, version: int, fence: int) -> None:
        key = self._writer.key
        keys = [key(session_id, "snapshots"), key(session_id, "pieces")]
        args = [version_name(version), key(session_id, "snapshot")]
        self._writer.write(session_id, scripts.DELETE_SNAPSHOT, fence, keys, args)

    def _piece(self, name: str) -> bytes:
        data: bytes | None = self._link.ask(lambda r: r.get(name))
        return data or b""

    def _need_session(self, session_id: str) -> None:
        if not self._link.ask(lambda r: r.exists(self._writer.key(session_id, "session"))):
            raise SessionNotFound("no such session")


def _piece(base: str, version: str, token: str, number: int) -> str:
    return f"{base}:{version}:{token}:{number}"


def _pointed(session_id: str, version: int, pointer: bytes) -> tuple[str, int, SnapshotRef]:
    """(token, number of pieces, reference) of a pointer."""
    token, count, nbytes, digest = pointer.decode().split()
    return token, int(count), SnapshotRef(session_id, version, int(nbytes), digest)
