"""One session as this process knows it: its lineage, kept level with the journal, and what runs on it now.

Owns reading and appending the journal in order. Knows no engine; who may write is the lease's matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import StoreUnavailable
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.events import EventLog
from mnemosyne.server.sessions.lineage import Session, replay
from mnemosyne.server.sessions.records import Record, Reply
from mnemosyne.server.sessions.trace import Trace

if TYPE_CHECKING:
    from mnemosyne.server.sessions.inspection import Inspector


class Live:
    """Belongs to one event loop. ``session`` is read freely and changed by ``append`` and ``refresh``
    alone."""

    def __init__(self, store: SessionStore, session: Session) -> None:
        self._store = store
        self.session = session
        self.events = EventLog()
        self.writer = asyncio.Lock()
        """Held by whoever is about to move the newest version: a turn, a document, a rewind."""
        self.settling = False
        """The writer has made its change known and is only putting things away: worth waiting for."""
        self.tasks: set[asyncio.Task[None]] = set()
        """Turns that run now, those that learn and those that don't."""
        self.absorber: asyncio.Task[None] | None = None
        self.uploading = asyncio.Lock()
        """Held while a document's bytes are taken."""
        self.inspectors: dict[str, Inspector] = {}
        """Checks of documents that are being received."""
        self.trouble: str | None = None
        """What ``health`` says, None where all is well."""
        self.gain: float | None = None
        """The memory's, of the newest text that this process saw it read (``kernels.health``)."""
        self.halts = 0
        """Who wants no document to be read now (``Absorber.stopped``)."""
        self.forgotten = False
        """The registry has dropped it; another ``Live`` may stand for the session, so it changes nothing."""
        self._journal = asyncio.Lock()
        self._tidy = False
        """No snapshot lies under an index that the journal doesn't reach."""

    @classmethod
    async def load(cls, store: SessionStore, session_id: str) -> Live:
        """Raises SessionNotFound, SnapshotCorrupt (a journal that can't be read), StoreUnavailable."""
        return cls(store, await asyncio.to_thread(lambda: replay(store.read(session_id))))

    @property
    def id(self) -> str:
        return self.session.id

    def has_read(self, trace: Trace) -> None:
        """Tell of a text what ``trace`` has of it."""
        if trace.chunks:
            self.events.add("surprise", trace.data())
            self.gain = trace.gain if trace.gain is not None else self.gain

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits here, so that the session may be forgotten and read again later."""
        return not (
            self.writer.locked() or self.tasks or self.absorber or self.events.readers or self.inspectors
        )

    async def refresh(self) -> None:
        """Take in what was appended since: by another server, or by an append of ours whose end we didn't
        see."""
        async with self._journal:
            await self._read_on()

    async def append(self, new: Sequence[Record], fence: int, snapshot: bytes | None = None) -> int:
        """Add records, durably, and apply them; returns the index of the first.

        ``snapshot`` is put under that index before: for commits whose tokens aren't in the log. Runs to its
        end though the caller be cancelled. Raises LeaseLost and StoreUnavailable, and then nothing was
        applied.
        """
        return await asyncio.shield(asyncio.ensure_future(self._append(new, fence, snapshot)))

    async def reply(self, key: str) -> Reply | None:
        """The first answer under an idempotency key, from the journal."""
        kept = self.session.replies.get(key)
        if kept is None:
            return None
        data = await asyncio.to_thread(lambda: next(iter(self._store.read(self.id, kept.index))))
        found: Reply | None = getattr(records.parse(data), "reply", None)
        return found

    async def _append(self, new: Sequence[Record], fence: int, snapshot: bytes | None) -> int:
        data = [records.to_bytes(record) for record in new]
        async with self._journal:
            first = self.session.length
            if not self._tidy:
                await asyncio.to_thread(self._drop_unreached, first, fence)
            if snapshot is not None:
                self._tidy = False
                await asyncio.to_thread(self._store.put_snapshot, self.id, first, snapshot, fence)
            length = await asyncio.to_thread(self._store.append, self.id, data, fence)
            self._tidy = True
            if length != first + len(new):
                # An append whose failure we were told had happened after all. Ours is in the journal too, on
                # top of what it doesn't know: read both, and let the caller fail rather than answer from the
                # wrong base.
                await self._read_on()
                raise StoreUnavailable("the session's log had moved on; nothing was answered, try again")
            for record in new:
                self.session.apply(record)
            return first

    def _drop_unreached(self, length: int, fence: int) -> None:
        """A snapshot is put before its record. Where the record never came (a crash, a full disk), the next
        one takes the index, and must not be restored as that state."""
        for ref in self._store.list_snapshots(self.id):
            if ref.version >= length:
                self._store.delete_snapshot(self.id, ref.version, fence)

    async def _read_on(self) -> None:
        start = self.session.length
        new = await asyncio.to_thread(
            lambda: [records.parse(data) for data in self._store.read(self.id, start)]
        )
        for record in new:
            self.session.apply(record)
