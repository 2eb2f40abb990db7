"""Pieces of one document on their way through the engine, each on top of the one before. Owns their handles
until they are read; knows no journal.

The engine is given the next piece before it has read this one, so that it never waits for the server.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from mnemosyne.server.sessions.core import Core
from mnemosyne.server.sessions.reader import Piece
from mnemosyne.server.sessions.trace import Trace

MOST = 2
"""Pieces under way: the one that is read, and the next."""
ALONE = 4
"""One piece in so many is sent when those before it are read: a state moves to another device between two."""


@dataclass(eq=False)
class Read:
    """A piece that the engine has read, or will have."""

    piece: Piece
    handle: str
    """The state after it."""
    trace: Trace = field(default_factory=Trace)
    sent: float = field(default_factory=time.monotonic)
    ended: float = 0.0


class Ahead:
    def __init__(self, core: Core, tenant: str, base: str) -> None:
        """``base``: the handle that the first piece goes on from; it isn't released here."""
        self._core, self._tenant, self._newest = core, tenant, base
        self._under_way: deque[tuple[asyncio.Future[None], Read]] = deque()
        self._sent = 0
        self._before = 0.0
        """When the piece before the oldest was read."""

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def full(self) -> bool:
        """The next piece is to be sent later."""
        return len(self._under_way) >= (1 if self._sent % ALONE == 0 else MOST)

    @property
    def oldest(self) -> asyncio.Future[None] | None:
        """Done once the oldest piece was read, or can't be."""
        return self._under_way[0][0] if self._under_way else None

    def send(self, piece: Piece) -> None:
        read = Read(piece, self._core.states.new_handle())
        reading = asyncio.ensure_future(self._read(self._newest, read))
        self._newest = read.handle
        self._sent += 1
        self._under_way.append((reading, read))

    def take(self) -> Read:
        """The oldest piece, which is done; its handle is the caller's. Raises what the engine raised."""
        reading, read = self._under_way.popleft()
        reading.result()
        began, self._before = max(read.sent, self._before), read.ended
        self._core.pace.measured(len(read.piece.ids), read.ended - began)
        return read

    async def abandon(self) -> None:
        """Stop what is under way, and leave nothing of it."""
        under_way, self._under_way = self._under_way, deque()
        for reading, _ in under_way:
            reading.cancel()
        for reading, read in under_way:
            await asyncio.wait({reading})
            if not reading.cancelled() and reading.exception() is None:
                self._core.engine.release(read.handle)

    async def _read(self, base: str, read: Read) -> None:
        """Cancelled or failed, it leaves nothing."""
        try:
            await self._core.engine.advance(
                base, read.handle, read.piece.ids, None, self._tenant, read.trace.add
            )
        except BaseException:
            self._core.engine.release(read.handle)
            raise
        read.ended = time.monotonic()
