"""Sessions in a directory of one machine: the embedded store. Knows no tensor and no record's meaning.

Owns what is inside a session's folder (the catalog owns the rest of the tree):

    meta  lock  lease  journal  snapshots/<version>  spool/<document>
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mnemosyne.checkpoints import files, framing
from mnemosyne.checkpoints.catalog import DirectoryCatalog
from mnemosyne.checkpoints.framed_file import FramedFile
from mnemosyne.checkpoints.lease_file import LeaseRecord, Process, read_lease, write_lease
from mnemosyne.checkpoints.names import document_name, session_name, version_name
from mnemosyne.checkpoints.store import Lease, SnapshotRef
from mnemosyne.engine.errors import (
    LeaseLost,
    OffsetMismatch,
    SessionBusy,
    SessionNotFound,
    SnapshotCorrupt,
    VersionNotFound,
)

_SNAPSHOT = struct.Struct("<4sIQ32s")
"""Before a snapshot's bytes: magic, version of this layout, length, SHA-256."""
_SNAPSHOT_MAGIC = b"MNSS"
_INDEXES_KEPT = 4096


class DirectoryStore:
    """``SessionStore`` on a local file system. Safe for threads and processes of one machine; not for NFS."""

    def __init__(self, path: Path | str) -> None:
        """Open or make the directory. Raises StoreUnavailable."""
        self._open_files: dict[Path, FramedFile] = {}
        with files.disk(f"open the data directory {path}"):
            self._catalog = DirectoryCatalog(Path(path))
        self._sessions = self._catalog.sessions

    def check(self) -> None:
        with files.disk("write to the data directory"):
            self._catalog.probe()

    def close(self) -> None:
        self._open_files.clear()

    def create(
        self, session_id: str, tenant: str, first: bytes, idempotency: tuple[str, bytes] | None = None
    ) -> bool:
        with files.disk("create a session"):
            return self._catalog.create(session_id, tenant, first, idempotency)

    def get_idempotent(self, key: str) -> bytes | None:
        with files.disk("read the data directory"):
            return self._catalog.idempotent(key)

    def exists(self, session_id: str) -> bool:
        with files.disk("read the data directory"):
            return self._catalog.exists(session_id)

    def list_sessions(self, tenant: str, after: str | None, limit: int) -> list[str]:
        with files.disk("read the data directory"):
            return self._catalog.list(tenant, after, limit)

    def erase(self, session_id: str, fence: int) -> dict[str, int]:
        with self._writing(session_id, fence) as folder:
            sizes = _sizes(folder)
            self._catalog.remove(session_id)
            self._open_files = {p: f for p, f in self._open_files.items() if folder not in p.parents}
        return sizes

    def stored_bytes(self, session_id: str) -> int:
        with self._session(session_id, shared=True) as folder:
            sizes = _sizes(folder)
        return sizes["journal_bytes"] + sizes["snapshot_bytes"] + sizes["spool_bytes"]

    def append(self, session_id: str, records: Sequence[bytes], fence: int) -> int:
        with self._writing(session_id, fence) as folder, _opened(folder / "journal", os.O_RDWR) as fd:
            journal = self._framed(folder / "journal", "the journal")
            if not records:
                return journal.refresh(fd)[0]
            return journal.append(fd, len(records), framing.pack(records))

    def read(self, session_id: str, start: int = 0) -> Iterator[bytes]:
        with self._session(session_id, shared=True) as folder, _opened(folder / "journal", os.O_RDONLY) as fd:
            journal = self._framed(folder / "journal", "the journal")
            end = journal.refresh(fd)[1]
            position = journal.position(start)
        # What was whole under the lock never changes again, so it is read without one.
        return self._records(folder / "journal", start, position, end)

    def _records(self, path: Path, start: int, position: int, end: int) -> Iterator[bytes]:
        with files.disk("read the journal"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise SessionNotFound("no such session") from None
            try:
                for first, payload, count in self._framed(path, "the journal").frames(fd, position, end):
                    yield from framing.unpack(payload, count, "the journal")[max(0, start - first) :]
            finally:
                os.close(fd)

    def journal_bytes(self, session_id: str) -> int:
        with self._session(session_id, shared=True) as folder, _opened(folder / "journal", os.O_RDONLY) as fd:
            return self._framed(folder / "journal", "the journal").refresh(fd)[1]

    def put_snapshot(self, session_id: str, version: int, data: bytes, fence: int) -> SnapshotRef:
        digest = hashlib.sha256(data)
        with self._writing(session_id, fence) as folder:
            path = folder / "snapshots" / version_name(version)
        # The long write happens outside the lock; the fence is compared again before the result counts.
        with files.disk("write a snapshot"):
            try:
                head = _SNAPSHOT.pack(_SNAPSHOT_MAGIC, 1, len(data), digest.digest())
                aside = files.write_aside(path, head, data)
            except FileNotFoundError:
                raise SessionNotFound("no such session") from None
        try:
            with self._writing(session_id, fence):
                files.publish(aside, path)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise
        return SnapshotRef(session_id, version, len(data), digest.hexdigest())

    def get_snapshot(self, session_id: str, version: int) -> bytes:
        with self._session(session_id, shared=True) as folder:
            try:
                stored = (folder / "snapshots" / version_name(version)).read_bytes()
            except FileNotFoundError:
                raise VersionNotFound(f"no snapshot of version {version}") from None
        data = stored[_SNAPSHOT.size :]
        if stored[: _SNAPSHOT.size] != _SNAPSHOT.pack(
            _SNAPSHOT_MAGIC, 1, len(data), hashlib.sha256(data).digest()
        ):
            raise SnapshotCorrupt(f"the stored snapshot of version {version} is corrupt")
        return data

    def list_snapshots(self, session_id: str) -> list[SnapshotRef]:
        refs = []
        with self._session(session_id, shared=True) as folder:
            for version in sorted(int(name) for name in os.listdir(folder / "snapshots") if name.isdecimal()):
                with open(folder / "snapshots" / str(version), "rb") as file:
                    digest = file.read(_SNAPSHOT.size)[-32:].hex()
                    nbytes = max(0, os.fstat(file.fileno()).st_size - _SNAPSHOT.size)
                refs.append(SnapshotRef(session_id, version, nbytes, digest))
        return refs

    def delete_snapshot(self, session_id: str, version: int, fence: int) -> None:
        with self._writing(session_id, fence) as folder:
            files.remove(folder / "snapshots" / version_name(version))

    def spool_append(self, session_id: str, document_id: str, offset: int, data: bytes, fence: int) -> int:
        with self._writing(session_id, fence) as folder:
            path = folder / "spool" / document_name(document_id)
            is_new = not path.exists()
            if is_new and (offset != 0 or not data):
                return _at_offset(0, offset)
            with _opened(path, os.O_RDWR | os.O_CREAT) as fd:
                if is_new:
                    files.sync_folder(path.parent)
                spool = self._framed(path, "the spool")
                length = _at_offset(spool.refresh(fd)[0], offset)
                return spool.append(fd, len(data), data) if data else length

    def spool_length(self, session_id: str, document_id: str) -> int:
        with self._session(session_id, shared=True) as folder:
            path = folder / "spool" / document_name(document_id)
            if not path.exists():
                return 0
            with _opened(path, os.O_RDONLY) as fd:
                return self._framed(path, "the spool").refresh(fd)[0]

    def spool_read(self, session_id: str, document_id: str, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        with self._session(session_id, shared=True) as folder:
            path = folder / "spool" / document_name(document_id)
            if not path.exists():
                return b""
            with _opened(path, os.O_RDONLY) as fd:
                spool = self._framed(path, "the spool")
                end = spool.refresh(fd)[1]
                for first, payload, _ in spool.frames(fd, spool.position(offset), end):
                    if first >= offset + length:
                        break
                    parts.append(payload[max(0, offset - first) : offset + length - first])
        return b"".join(parts)

    def spool_delete(self, session_id: str, document_id: str, fence: int) -> None:
        with self._writing(session_id, fence) as folder:
            path = folder / "spool" / document_name(document_id)
            files.remove(path)
            self._open_files.pop(path, None)

    def acquire(self, session_id: str, owner: str, ttl_seconds: float) -> Lease:
        if not owner:
            raise ValueError("a lease needs an owner")
        with self._session(session_id) as folder:
            held, now = read_lease(folder / "lease"), time.time()
            fence = held.fence
            if not held.is_of(owner):
                if not held.is_free(now):
                    raise SessionBusy("another writer holds the session", retry_after=held.expires_at - now)
                fence += 1
                for left in (folder / "snapshots").glob(f"*{files.ASIDE}"):
                    left.unlink(missing_ok=True)
            record = LeaseRecord(owner, fence, now + ttl_seconds, Process.this())
            write_lease(folder / "lease", record)
        return Lease(session_id, owner, fence, record.expires_at)

    def release(self, lease: Lease) -> None:
        """Let go of the session; nothing happens where it is another's by now."""
        with suppress(SessionNotFound), self._session(lease.session_id) as folder:
            held = read_lease(folder / "lease")
            if held.is_of(lease.owner) and held.fence == lease.fence:
                write_lease(folder / "lease", LeaseRecord(fence=held.fence))

    @contextmanager
    def _session(self, session_id: str, *, shared: bool = False) -> Iterator[Path]:
        """The session's folder under its lock. Raises SessionNotFound, StoreUnavailable."""
        folder = self._sessions / session_name(session_id)
        with files.disk("use the data directory"):
            try:
                lock = files.lock(folder / "lock", shared=shared)
            except FileNotFoundError:
                os.stat(self._sessions)
                raise SessionNotFound("no such session") from None
            try:
                yield folder
            finally:
                os.close(lock)

    @contextmanager
    def _writing(self, session_id: str, fence: int) -> Iterator[Path]:
        """The session's folder, for the owner under the newest fence only. Raises LeaseLost."""
        with self._session(session_id) as folder:
            held = read_lease(folder / "lease")
            if not held.owner or held.fence != fence:
                raise LeaseLost("the session is another writer's by now", fence=fence, newest=held.fence)
            yield folder

    def _framed(self, path: Path, what: str) -> FramedFile:
        if path not in self._open_files and len(self._open_files) >= _INDEXES_KEPT:
            self._open_files.clear()
        return self._open_files.setdefault(path, FramedFile(path, what))


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, files.FILE_MODE)
    try:
        yield fd
    finally:
        os.close(fd)


def _at_offset(length: int, offset: int) -> int:
    if offset != length:
        raise OffsetMismatch(f"the upload goes on at byte {length}, not {offset}", offset=length)
    return length


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes on disk by kind, for a receipt."""
    snapshots = [entry.stat().st_size for entry in os.scandir(folder / "snapshots")]
    return {
        "journal_bytes": os.stat(folder / "journal").st_size,
        "snapshots": len(snapshots),
        "snapshot_bytes": sum(snapshots),
        "spool_bytes": sum(entry.stat().st_size for entry in os.scandir(folder / "spool")),
    }
