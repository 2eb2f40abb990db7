"""Which sessions a directory holds. Owns creation, order, idempotency entries and removal; knows no record's
meaning.

    <root>/lock                         one creation or erasure at a time; holds the last sequence number
    <root>/sessions/<id>/               a session: visible as soon as this name exists, and only then
    <root>/tenants/<hash>/<number>-<id> the order in which a tenant's sessions were made
    <root>/idempotency/<hash>           the value given with a creation; holds while its session exists
    <root>/aside/                       what is being made or erased; emptied when the directory is opened
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mnemosyne.checkpoints import files, framing
from mnemosyne.checkpoints.names import hashed, is_id
from mnemosyne.engine.errors import RequestError, SessionError, SnapshotCorrupt

IDEMPOTENCY_SECONDS = 24 * 3600
_ENTRY = "an idempotency entry"


@dataclass(frozen=True)
class _Meta:
    """What leads from a session's folder to its entries elsewhere, so that erasing finds them."""

    tenant: str
    sequence: int
    idempotency: str | None


class DirectoryCatalog:
    """Errors: OSError as it comes; the store names it."""

    def __init__(self, root: Path) -> None:
        self.sessions = root / "sessions"
        self._lock = root / "lock"
        self._aside = root / "aside"
        self._tenants = root / "tenants"
        self._idempotency = root / "idempotency"
        root.mkdir(mode=files.FOLDER_MODE, parents=True, exist_ok=True)
        for folder in (self.sessions, self._aside, self._tenants, self._idempotency):
            files.make_folder(folder)
        os.close(os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, files.FILE_MODE))
        files.sync_folder(root)
        with files.locked(self._lock):
            for left in self._aside.iterdir():
                self._discard(left)

    def probe(self) -> None:
        """Write, sync and remove a small file."""
        probe = self._aside / f"probe-{secrets.token_hex(8)}"
        files.write_new(probe, bytes(4096))
        probe.unlink()

    def exists(self, session_id: str) -> bool:
        os.stat(self.sessions)
        return is_id(session_id) and (self.sessions / session_id).exists()

    def create(
        self, session_id: str, tenant: str, first: bytes, idempotency: tuple[str, bytes] | None
    ) -> bool:
        """Build aside, then rename: a crash at any moment leaves all of the session or none of it."""
        if not is_id(session_id):
            raise RequestError("a session id is 1 to 64 of 0-9 a-z A-Z _ -", param="session_id")
        folder, aside = self.sessions / session_id, self._aside / session_id
        with files.locked(self._lock) as lock:
            if folder.exists():
                raise SessionError("a session of this id exists")
            if idempotency is not None and self.idempotent(idempotency[0]) is not None:
                return False
            sequence = max(int(os.pread(lock, 20, 0) or b"0") + 1, time.time_ns())
            files.write_at(lock, b"%020d" % sequence, 0)
            key = hashed(idempotency[0]) if idempotency is not None else None
            try:
                self._build(aside, _Meta(hashed(tenant), sequence, key), first)
                if idempotency is not None:
                    self._remember(session_id, *idempotency)
                self._enlist(session_id, hashed(tenant), sequence)
                os.rename(aside, folder)
                files.sync_folder(self.sessions)
            except OSError:
                with suppress(OSError):
                    if folder.exists():
                        os.rename(folder, aside)
                    self._discard(aside)
                raise
        return True

    def idempotent(self, key: str) -> bytes | None:
        """The value remembered under a key, younger than 24 hours and of a session that exists."""
        try:
            data = (self._idempotency / hashed(key)).read_bytes()
        except FileNotFoundError:
            return None
        header, payload = framing.decode(data, _ENTRY)
        session_id, made, value = framing.unpack(payload, header.count, _ENTRY)
        fresh = time.time() - float(made) < IDEMPOTENCY_SECONDS
        return value if fresh and self.exists(session_id.decode()) else None

    def list(self, tenant: str, after: str | None, limit: int) -> list[str]:
        try:
            names = sorted(os.listdir(self._tenants / hashed(tenant)))
        except FileNotFoundError:
            os.stat(self._tenants)
            names = []
        ids = [name.partition("-")[2] for name in names]
        if after is not None:
            if after not in ids or not self.exists(after):
                raise RequestError("no such session to list after", param="after")
            ids = ids[ids.index(after) + 1 :]
        found: list[str] = []
        for session_id in ids:
            if len(found) >= limit:
                break
            if self.exists(session_id):
                found.append(session_id)
        return found

    def remove(self, session_id: str) -> None:
        """Invisible at once, then every byte; a crash in between is finished when the directory is opened."""
        with files.locked(self._lock):
            aside = self._aside / f"{session_id}.{secrets.token_hex(8)}"
            os.rename(self.sessions / session_id, aside)
            files.sync_folder(self.sessions)
            self._discard(aside)

    def _build(self, aside: Path, meta: _Meta, first: bytes) -> None:
        if aside.exists():
            self._discard(aside)
        files.make_folder(aside)
        files.write_new(aside / "meta", framing.encode(0, 1, json.dumps(asdict(meta)).encode()))
        files.write_new(aside / "lock")
        files.write_new(aside / "journal", framing.encode(0, 1, framing.pack([first])))
        for name in ("snapshots", "spool"):
            files.make_folder(aside / name)
        files.sync_folder(aside)
        files.sync_folder(self._aside)

    def _remember(self, session_id: str, key: str, value: bytes) -> None:
        entry = framing.pack([session_id.encode(), repr(time.time()).encode(), value])
        files.replace(self._idempotency / hashed(key), framing.encode(0, 3, entry))

    def _enlist(self, session_id: str, tenant: str, sequence: int) -> None:
        index = self._tenants / tenant
        files.make_folder(index)
        files.sync_folder(self._tenants)
        files.write_new(index / _order(sequence, session_id))
        files.sync_folder(index)

    def _discard(self, left: Path) -> None:
        """Remove a session that isn't visible, the entries that lead to it first; or a probe's file."""
        if not left.is_dir():
            left.unlink(missing_ok=True)
            return
        session_id = left.name.partition(".")[0]
        with suppress(FileNotFoundError, SnapshotCorrupt):
            meta = _Meta(**json.loads(framing.decode((left / "meta").read_bytes(), "meta")[1]))
            files.remove(self._tenants / meta.tenant / _order(meta.sequence, session_id))
            if meta.idempotency is not None:
                entry = self._idempotency / meta.idempotency
                header, payload = framing.decode(entry.read_bytes(), _ENTRY)
                if framing.unpack(payload, header.count, _ENTRY)[0] == session_id.encode():
                    files.remove(entry)
        shutil.rmtree(left)
        files.sync_folder(self._aside)


def _order(sequence: int, session_id: str) -> str:
    return f"{sequence:020d}-{session_id}"
