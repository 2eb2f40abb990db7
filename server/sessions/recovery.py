"""From a place in a session's log to its state: the newest usable snapshot, then a replay of the tokens after
it.

Owns the choice and the report. Knows no lease: restoring only reads. A snapshot that can't be used is refused
aloud (a log line, the report) and the next older one is tried; a replay from the first token is the last
resort.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import SnapshotCorrupt, SnapshotError, StateIncompatible, VersionNotFound
from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import INITIAL
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.lineage import Session
from mnemosyne.server.sessions.pace import Pace
from mnemosyne.server.sessions.paths import Segment, canonical, chain, segments
from mnemosyne.server.sessions.records import Point
from mnemosyne.server.sessions.residents import Resident, Residents
from mnemosyne.server.sessions.tokenrun import TokenRun

log = logging.getLogger(__name__)
PIECE = 8192
"""Tokens replayed in one request: what other sessions may have to wait for is the engine's matter, not
this."""


@dataclass(frozen=True)
class Refused:
    """A snapshot that wasn't used."""

    session_id: str
    index: int
    error: str
    message: str


@dataclass(frozen=True)
class Restored:
    """A state brought back, and how."""

    resident: Resident
    reused_tokens: int
    recomputed_tokens: int
    refused: tuple[Refused, ...]


class Recovery:
    def __init__(self, store: SessionStore, engine: EngineLike, residents: Residents, pace: Pace) -> None:
        self._store, self._engine, self._residents, self._pace = store, engine, residents, pace
        self.restores = self.refusals = self.replayed = 0

    async def restore(self, home: Point, family: Mapping[str, Session], tenant: str) -> Restored:
        """Bind the state at ``home``. Raises StateIncompatible if the session is of other weights,
        SnapshotCorrupt if the log can't make up for a snapshot that is lost."""
        fingerprint = family[home.session_id].created.fingerprint
        if fingerprint != self._engine.info.model_fingerprint:
            raise StateIncompatible(
                "the session was made under other weights than those served",
                session_model=fingerprint,
                model=self._engine.info.model_fingerprint,
            )
        refused: list[Refused] = []
        held, handle, reused = await self._base(home, family, refused)
        if held is not None:
            self._residents.pin(held)
        owned = held is None and handle != INITIAL
        try:
            last = await self._replay(handle, owned, segments(home, reused, family), tenant)
        finally:
            if held is not None:
                self._residents.unpin(held)
        recomputed = home.tokens - reused
        self.restores += 1
        self.replayed += recomputed
        log.info("session %s restored: %d tokens reused, %d replayed", home.session_id, reused, recomputed)
        saved = held.saved if held is not None else reused
        resident = Resident(canonical(home, family), home, last, saved, claims={home.session_id})
        if held is not None and last == held.handle:
            resident = held
        return Restored(resident, reused, recomputed, tuple(refused))

    async def _base(
        self, home: Point, family: Mapping[str, Session], refused: list[Refused]
    ) -> tuple[Resident | None, str, int]:
        """(where it is held, handle, tokens) of the newest state on the way back that is held or can be
        loaded."""
        kept: dict[str, set[int]] = {}
        if home.tokens == 0:
            return None, INITIAL, 0
        for session_id, commit, limit in chain(home, family):
            held = self._residents.find(canonical(Point(session_id, commit.index, limit), family))
            if held is not None:
                return held, held.handle, limit
            if session_id not in kept:
                refs = await asyncio.to_thread(self._store.list_snapshots, session_id)
                kept[session_id] = {ref.version for ref in refs}
            if commit.tokens == limit and commit.index in kept[session_id]:
                handle = await self._load(session_id, commit.index, limit, refused)
                if handle is not None:
                    return None, handle, limit
            if not commit.readable:
                if refused:
                    raise SnapshotCorrupt(refused[0].message, refused=[r.index for r in refused])
                raise VersionNotFound("no snapshot of this version is kept, and its input isn't either")
        return None, INITIAL, 0

    async def _load(self, session_id: str, index: int, tokens: int, refused: list[Refused]) -> str | None:
        handle = self._residents.new_handle()
        try:
            data = await asyncio.to_thread(self._store.get_snapshot, session_id, index)
            loaded = await self._engine.load(handle, data)
            if loaded.tokens_seen == tokens:
                return handle
            self._engine.release(handle)
            raise SnapshotCorrupt(f"the snapshot has read {loaded.tokens_seen} tokens, the log {tokens}")
        except VersionNotFound:
            return None  # thinned out by another server since it was listed
        except SnapshotError as error:
            self.refusals += 1
            refused.append(Refused(session_id, index, type(error).__name__, error.message))
            log.error("snapshot %d of session %s is refused: %s", index, session_id, error.message)
            return None

    async def _replay(self, handle: str, owned: bool, parts: list[Segment], tenant: str) -> str:
        """Advance from ``handle`` over the log; returns the last handle. ``owned`` handles are released on
        the way and on failure."""
        pieces = _pieces(self._store, parts)
        reading = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
        try:
            while (piece := await reading) is not None:
                reading = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
                base, began = handle, time.monotonic()
                handle = self._residents.new_handle()
                try:
                    await self._engine.advance(base, handle, *piece, tenant)
                finally:
                    if owned:
                        self._engine.release(base)
                    owned = True
                self._pace.measured(len(piece[0]), time.monotonic() - began)
        except BaseException:
            if owned:
                self._engine.release(handle)
            raise
        finally:
            await asyncio.wait({reading})
        return handle


def tokens_of(store: SessionStore, parts: list[Segment]) -> tuple[int, ...]:
    """The token ids of the segments, in order. Blocking."""
    return tuple(token for run, start, stop in _runs(store, parts) for token in run.ids()[start:stop])


def _pieces(store: SessionStore, parts: list[Segment]) -> Iterator[tuple[tuple[int, ...], bytes]]:
    """(ids, kinds) of the segments in order, up to ``PIECE`` tokens at a time; reads each journal once, in a
    row."""
    ids: list[int] = []
    kinds = bytearray()
    for run, start, stop in _runs(store, parts):
        ids += run.ids()[start:stop]
        kinds += run.kinds()[start:stop]
        while len(ids) >= PIECE:
            yield tuple(ids[:PIECE]), bytes(kinds[:PIECE])
            del ids[:PIECE], kinds[:PIECE]
    if ids:
        yield tuple(ids), bytes(kinds)


def _runs(store: SessionStore, parts: list[Segment]) -> Iterator[tuple[TokenRun, int, int]]:
    """(tokens of a record, first wanted, end of wanted) for each segment."""
    session_id, at = "", 0
    journal: Iterator[bytes] = iter(())
    for part in parts:
        if part.session_id != session_id or part.index < at:
            session_id, at, journal = part.session_id, part.index, store.read(part.session_id, part.index)
        while at <= part.index:
            data, at = next(journal, None), at + 1
        record = records.parse(data) if data is not None else None
        if not isinstance(record, records.Turn | records.DocumentPiece):
            raise SnapshotCorrupt(f"record {part.index} of the journal should hold tokens")
        yield record.tokens, part.start - part.first, part.stop - part.first
