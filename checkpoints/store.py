"""Where sessions last: the protocol that a directory and Redis both keep. Knows bytes and names, no tensor.

A session in a store is
- a *journal*: an append-only list of small records (JSON bytes), the session's only truth. The first record
  makes it.
- *snapshots*: a cache of some versions, rebuilt from the journal when lost. Written aside, then pointed to.
- a *spool*: bytes of documents that were acknowledged and aren't absorbed yet.
- a *lease*: who may write, with a fencing token that only rises.

Every write names the fence it was made under; a store refuses a write under a fence that is not the newest
(``LeaseLost``). A write that returns is on disk. A store that can't be reached or written raises
``StoreUnavailable`` and has changed nothing that a reader can see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Lease:
    session_id: str
    owner: str
    fence: int
    """Rises with every change of owner; the store keeps the newest."""
    expires_at: float
    """Unix seconds by the store's clock."""


@dataclass(frozen=True)
class SnapshotRef:
    session_id: str
    version: int
    nbytes: int
    sha256: str


class SnapshotStore(Protocol):
    """Snapshots of sessions, by version."""

    def put_snapshot(self, session_id: str, version: int, data: bytes, fence: int) -> SnapshotRef: ...

    def get_snapshot(self, session_id: str, version: int) -> bytes:
        """The bytes as put. Raises VersionNotFound, SnapshotCorrupt where they don't match their checksum."""
        ...

    def list_snapshots(self, session_id: str) -> list[SnapshotRef]:
        """Oldest version first."""
        ...

    def delete_snapshot(self, session_id: str, version: int, fence: int) -> None: ...


class SessionStore(SnapshotStore, Protocol):
    """All that a server keeps. Synchronous: callers on an event loop use a thread."""

    def check(self) -> None:
        """Raise StoreUnavailable unless the store can be read and written."""
        ...

    def close(self) -> None: ...

    def create(
        self, session_id: str, tenant: str, first: bytes, idempotency: tuple[str, bytes] | None = None
    ) -> bool:
        """Make a session with its first journal record, atomically with the idempotency entry, if any.

        ``idempotency`` is (scope key, value); False when that key exists already (nothing is made then).
        """
        ...

    def get_idempotent(self, key: str) -> bytes | None:
        """The value given with ``create`` under that key, for 24 hours or until the session is erased."""
        ...

    def exists(self, session_id: str) -> bool: ...

    def list_sessions(self, tenant: str, after: str | None, limit: int) -> list[str]:
        """Session ids of a tenant in the order they were made, after the given one (else RequestError)."""
        ...

    def append(self, session_id: str, records: Sequence[bytes], fence: int) -> int:
        """Add records to the journal, all or none; returns the journal's new length. Durable on return."""
        ...

    def read(self, session_id: str, start: int = 0) -> Iterator[bytes]:
        """Journal records from index ``start``. A crash's torn last record was never acknowledged: left out.

        Raises SnapshotCorrupt where a record is damaged, also while it is iterated.
        """
        ...

    def journal_bytes(self, session_id: str) -> int: ...

    def spool_append(self, session_id: str, document_id: str, offset: int, data: bytes, fence: int) -> int:
        """Add bytes at ``offset``, which must be the spool's length; returns the new length.

        Raises OffsetMismatch, whose attribute ``offset`` says where to go on.
        """
        ...

    def spool_length(self, session_id: str, document_id: str) -> int:
        """0 for a spool that was never written."""
        ...

    def spool_read(self, session_id: str, document_id: str, offset: int, length: int) -> bytes: ...

    def spool_delete(self, session_id: str, document_id: str, fence: int) -> None: ...

    def acquire(self, session_id: str, owner: str, ttl_seconds: float) -> Lease:
        """Own the session, or renew; raises SessionBusy (``retry_after``) while another owner's lease runs.

        The fence stays with renewals, also of a lease that ran out and that nobody took.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Let go of the session; nothing happens where it is another's by now, or erased."""
        ...

    def erase(self, session_id: str, fence: int) -> dict[str, int]:
        """Remove every byte of the session, its idempotency entry too; returns what went, for a receipt.

        Keys of the receipt: journal_bytes, snapshots (how many), snapshot_bytes, spool_bytes.
        """
        ...

    def stored_bytes(self, session_id: str) -> int: ...
