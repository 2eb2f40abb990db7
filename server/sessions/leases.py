"""Who may write: one lease per session in use, shared by everything in this process that writes to it.

Owns acquiring, renewing and letting go. Knows no journal: whoever holds a lease reads what others wrote
before it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mnemosyne.checkpoints.store import Lease, SessionStore
from mnemosyne.engine.errors import LeaseLost, MnemosyneError, SessionBusy, SessionNotFound

log = logging.getLogger(__name__)


@dataclass
class Held:
    """A lease while it is held. ``fence`` goes with every write."""

    lease: Lease
    lost: bool = False

    @property
    def fence(self) -> int:
        """Raises LeaseLost once another owner has the session."""
        if self.lost:
            raise LeaseLost("another server has taken the session over; nothing was changed", retry_after=1)
        return self.lease.fence


@dataclass
class _Entry:
    users: int = 0
    held: Held | None = None
    renewal: asyncio.Task[None] | None = None
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Leases:
    def __init__(
        self, store: SessionStore, owner: str, seconds: float, on_lost: Callable[[str], None]
    ) -> None:
        self._store, self._owner, self._seconds, self._on_lost = store, owner, seconds, on_lost
        self._entries: dict[str, _Entry] = {}

    def holds(self, session_id: str) -> bool:
        """Whether nobody else can be writing to the session now."""
        entry = self._entries.get(session_id)
        return entry is not None and entry.held is not None and not entry.held.lost

    @asynccontextmanager
    async def hold(self, session_id: str) -> AsyncIterator[Held]:
        """Own the session while inside. Raises SessionBusy (with ``retry_after``) while another server owns
        it."""
        entry = self._entries.setdefault(session_id, _Entry())
        entry.users += 1
        try:
            # Shielded: an acquisition that nobody waits for any more must still be known, to be let go.
            yield await asyncio.shield(asyncio.ensure_future(self._acquire(session_id, entry)))
        finally:
            entry.users -= 1
            await asyncio.shield(asyncio.ensure_future(self._let_go(session_id, entry)))

    async def _acquire(self, session_id: str, entry: _Entry) -> Held:
        async with entry.changing:
            if entry.held is None or entry.held.lost:
                lease = await asyncio.to_thread(self._store.acquire, session_id, self._owner, self._seconds)
                entry.held = Held(lease)
                entry.renewal = asyncio.create_task(self._renew(session_id, entry.held))
            return entry.held

    async def _let_go(self, session_id: str, entry: _Entry) -> None:
        async with entry.changing:
            if entry.users:
                return
            held, entry.held = entry.held, None
            if held is not None and entry.renewal is not None:
                entry.renewal.cancel()
                await asyncio.wait({entry.renewal})  # a renewal on its way must not come after the release
            if held is not None and not held.lost:
                try:
                    await asyncio.to_thread(self._store.release, held.lease)
                except MnemosyneError as error:
                    log.warning("the lease of %s runs out by itself: %s", session_id, error.message)
            if not entry.users and self._entries.get(session_id) is entry:
                del self._entries[session_id]

    async def _renew(self, session_id: str, held: Held) -> None:
        while not held.lost:
            await asyncio.sleep(self._seconds / 3)
            try:
                lease = await asyncio.to_thread(self._store.acquire, session_id, self._owner, self._seconds)
            except (SessionBusy, SessionNotFound):
                self._lose(session_id, held)
            except MnemosyneError as error:
                log.warning("the lease of %s can't be renewed: %s", session_id, error.message)
            else:
                # A higher fence: ours ran out, somebody else wrote, and what we hold in memory is of before.
                if lease.fence != held.lease.fence:
                    self._lose(session_id, held)
                    await asyncio.to_thread(self._store.release, lease)

    def _lose(self, session_id: str, held: Held) -> None:
        held.lost = True
        self._on_lost(session_id)
