"""Reads received documents into their sessions, one after the other. Owns the order, the pipeline and what
happens when something fails; knows no upload.

Each piece's ids are in the journal as soon as it was read, so a crash costs a piece or two; the document
becomes a version with its last piece, and until then the version before it stands.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from mnemosyne.engine.errors import (
    CapacityError,
    EngineUnavailable,
    LeaseLost,
    MnemosyneError,
    SessionBusy,
    SessionNotFound,
    SnapshotError,
    StoreError,
    UnknownHandle,
)
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.ahead import MOST, Ahead, Read
from mnemosyne.server.sessions.core import Core
from mnemosyne.server.sessions.failures import told
from mnemosyne.server.sessions.leases import Held
from mnemosyne.server.sessions.lineage import Document
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.reader import DocumentReader, Piece
from mnemosyne.server.sessions.records import DocumentAbsorbed, DocumentEnded, DocumentPiece
from mnemosyne.server.sessions.residents import Resident
from mnemosyne.server.sessions.tokenrun import INPUT, TokenRun
from mnemosyne.server.sessions.trace import Trace

log = logging.getLogger(__name__)
SMALLEST, LARGEST = 2048, 1 << 19
"""Tokens of a piece; about a second's work in between."""
PASSING = (StoreError, EngineUnavailable, UnknownHandle, CapacityError, SessionBusy, SnapshotError)
"""Failures that are no fault of the document: it is gone on with later."""
FIRST_DELAY, LONGEST_DELAY = 0.25, 10.0


@dataclass
class _Progress:
    """A document while it is read."""

    document: Document
    resident: Resident
    """The state at the newest piece in the journal."""
    handle: str
    """The state at the newest piece."""
    ids: list[int] = field(default_factory=list)
    """Read and not in the journal yet."""
    trace: Trace = field(default_factory=Trace)
    piece: Piece | None = None
    """The newest piece, where it isn't in the journal yet."""


class Absorber:
    def __init__(self, core: Core) -> None:
        self._core = core
        self.active = 0
        self.tokens = 0
        """Absorbed since the start."""
        core.registry.on_found.append(self.wake)

    def wake(self, live: Live) -> None:
        """See that the session's received documents are being read."""
        if live.session.reading is None or live.absorber is not None or self._core.draining:
            return
        if live.halts or live.forgotten or live.session.deleted:
            return
        if live.session.created.fingerprint != self._core.engine.info.model_fingerprint:
            return
        live.absorber = self._core.spawn(self._run(live), f"reading into {live.id}")

    @asynccontextmanager
    async def stopped(self, live: Live) -> AsyncIterator[None]:
        """While inside no document is being read into the session, whoever looks it up meanwhile."""
        live.halts += 1
        try:
            if (task := live.absorber) is not None:
                task.cancel()
                await asyncio.wait({task})
                live.absorber = None  # a task that was cancelled before its first step can't say so itself
            yield
        finally:
            live.halts -= 1
            self.wake(live)

    async def settle(self) -> None:
        """Return when every absorber has stopped, at the end of its piece; none begins while the service
        drains."""
        while tasks := {live.absorber for live in self._core.registry.all() if live.absorber is not None}:
            await asyncio.wait(tasks)

    async def _run(self, live: Live) -> None:
        delay = FIRST_DELAY
        self.active += 1
        try:
            while live.session.reading is not None and not self._core.draining:
                before = live.session.length
                try:
                    await self._read_next(live)
                except (SessionNotFound, LeaseLost):
                    return  # gone, or another's: whoever looks the session up next sees to its documents
                except PASSING as error:
                    log.warning("reading into session %s goes on later: %s", live.id, error.message)
                    live.events.add("error", told(error))
                    if isinstance(error, CapacityError):
                        await self._core.make_room()
                    delay = FIRST_DELAY if live.session.length > before else min(2 * delay, LONGEST_DELAY)
                    await asyncio.sleep(delay)
        finally:
            self.active -= 1
            live.absorber = None

    async def _read_next(self, live: Live) -> None:
        try:
            async with live.writer, self._core.writing(live) as held:
                document = live.session.reading
                if document is not None:
                    await self._read_or_reject(live, held, document)
        finally:
            live.settling = False
        await self._core.make_room()

    async def _read_or_reject(self, live: Live, held: Held, document: Document) -> None:
        try:
            await self._read(live, held, document)
        except PASSING:
            raise
        except Exception as error:
            if not isinstance(error, MnemosyneError):
                log.exception("document %s of session %s can't be read", document.id, live.id)
                error = MnemosyneError("the server made a mistake while reading this document")
            await self._reject(live, held, document, error)
        if live.session.document(document.id).ended:
            await self._core.states.keep_only(live, live.session.point())
            await asyncio.to_thread(self._core.store.spool_delete, live.id, document.id, held.fence)

    async def _read(self, live: Live, held: Held, document: Document) -> None:
        core, begins = self._core, document.last_piece is None
        async with core.states.use(live, live.session.newest_commit) as pinned:
            try:
                reader = DocumentReader(core.store, live.id, document, core.tokenizer)
                await self._pipeline(live, held, reader, _Progress(document, pinned.resident, pinned.handle))
            finally:
                if begins:  # the version to return to, should the rest be refused
                    pinned.resident.claims.add(live.id)

    async def _pipeline(self, live: Live, held: Held, reader: DocumentReader, at: _Progress) -> None:
        """While the engine reads one piece and has been given the next, the one before goes into the journal
        and the one after is tokenized."""
        ahead = Ahead(self._core, live.session.created.tenant, at.handle)
        tokenizing = self._tokenize(reader)
        more = True
        try:
            while not self._core.draining and (more or ahead.oldest is not None):
                waits: set[asyncio.Future[Any]] = {tokenizing} if more and not ahead.full else set()
                if ahead.oldest is not None:
                    waits.add(ahead.oldest)
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if tokenizing in waits and tokenizing.done():
                    piece = tokenizing.result()
                    if piece is not None:
                        ahead.send(piece)
                    more = piece is not None and not piece.last
                    if more:
                        tokenizing = self._tokenize(reader)
                if ahead.oldest is not None and ahead.oldest.done():
                    self._move_to(ahead.take(), at)
                    if len(ahead) or more:
                        await self._save(live, held, at)
            if not more and ahead.oldest is None:
                await self._save(live, held, at, last=True)
        finally:
            await ahead.abandon()
            if at.handle != at.resident.handle:
                self._core.engine.release(at.handle)
            await asyncio.wait({tokenizing})
            tokenizing.exception()  # of a piece that nobody waits for any more

    def _tokenize(self, reader: DocumentReader) -> asyncio.Future[Piece | None]:
        return asyncio.ensure_future(asyncio.to_thread(reader.next, self._piece_tokens()))

    def _move_to(self, read: Read, at: _Progress) -> None:
        if at.handle != at.resident.handle:
            self._core.engine.release(at.handle)
        at.handle, at.piece, at.trace = read.handle, read.piece, read.trace
        at.ids += read.piece.ids

    async def _save(self, live: Live, held: Held, at: _Progress, last: bool = False) -> None:
        """Put what was read into the journal; with ``last`` it becomes a version.

        Where the input isn't retained the state itself is put instead, and so less often."""
        session, core = live.session, self._core
        piece, retain = at.piece, session.created.retain_input
        if not last and (piece is None or not (retain or len(at.ids) >= core.snapshots.every)):
            return
        new: list[records.Record] = []
        if piece is not None:
            tokens = TokenRun.pack(at.ids, [(INPUT, len(at.ids))], retain)
            new.append(
                DocumentPiece(
                    at=time.time(),
                    document=at.document.id,
                    tokens=tokens,
                    nbytes=piece.end,
                    surprise=at.trace.surprise,
                )
            )
        if last:
            number = session.newest.number + 1
            new.append(DocumentAbsorbed(at=time.time(), document=at.document.id, version=number))
        snapshot = None if retain or piece is None else await core.engine.export(at.handle)
        live.settling = last
        await live.append(new, held.fence, snapshot)
        self.tokens += len(at.ids)
        home = session.point() if last else session.newest_commit
        at.resident = await core.states.move(live, at.resident, home, at.handle, saved=snapshot is not None)
        at.handle = at.resident.handle
        at.ids, at.piece = [], None
        self._tell(live, at)
        if last:
            core.told(live, session.newest)
            live.events.add("document", {"document": at.document.id, "status": "absorbed"})

    async def _reject(self, live: Live, held: Held, document: Document, error: MnemosyneError) -> None:
        log.warning("document %s of session %s is rejected: %s", document.id, live.id, error.message)
        if type(error).__name__ == "NotFinite":
            live.trouble = "not_finite"
        live.settling = True
        await live.append([ended(document, "rejected", error)], held.fence)
        live.events.add("document", {"document": document.id, "status": "rejected"})
        live.events.add("error", told(error))

    def _tell(self, live: Live, at: _Progress) -> None:
        document = live.session.document(at.document.id)
        total, pace = document.nbytes or 0, self._core.pace.tokens_per_second
        left = total - document.absorbed_bytes
        per_byte = document.absorbed_tokens / max(1, document.absorbed_bytes)
        live.events.add(
            "progress",
            {
                "document": document.id,
                "tokens_absorbed": document.absorbed_tokens,
                "bytes_absorbed": document.absorbed_bytes,
                "bytes_total": total,
                "tokens_per_second": round(pace, 1),
                "seconds_left": round(left * per_byte / pace, 1),
                "surprise": at.trace.surprise,
            },
        )
        live.has_read(at.trace)

    def _piece_tokens(self) -> int:
        # All who read have pieces under way: together they leave a third of the engine's queue to others.
        share = max(8, 3 * MOST // 2 * self.active)
        at_most = min(LARGEST, self._core.engine.info.max_queued_tokens // share)
        return max(1, min(at_most, max(SMALLEST, int(self._core.pace.tokens_per_second))))


def ended(document: Document, status: str, error: MnemosyneError | None) -> DocumentEnded:
    """The record of a document that won't be read."""
    kept = told(error) if error is not None else None
    return DocumentEnded(at=time.time(), document=document.id, status=status, error=kept)
