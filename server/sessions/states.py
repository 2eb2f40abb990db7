"""A session's states, ready for use: held by the engine, or brought back when they are asked for.

Owns that each is restored once however many ask, that the newest follows the session's moves, and that no
more are held than there is room for. How to restore is recovery's matter, when to save the snapshots'.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mnemosyne.engine.errors import MnemosyneError, UnknownHandle
from mnemosyne.engine.messages import INITIAL
from mnemosyne.server.sessions.failures import told
from mnemosyne.server.sessions.lineage import Session
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.paths import canonical
from mnemosyne.server.sessions.records import Point
from mnemosyne.server.sessions.recovery import Recovery, Restored
from mnemosyne.server.sessions.residents import Resident, Residents
from mnemosyne.server.sessions.snapshots import Snapshots

log = logging.getLogger(__name__)
Family = Callable[[Session], Awaitable[Mapping[str, Session]]]
Lives = Callable[[str], Awaitable[Live | None]]
"""A session by its id."""


@dataclass(frozen=True)
class Pinned:
    """A state while it is used."""

    resident: Resident
    recomputed_tokens: int
    """Tokens that were replayed to have it; 0 where it was held or came from a snapshot."""

    @property
    def handle(self) -> str:
        return self.resident.handle


class States:
    def __init__(
        self, residents: Residents, recovery: Recovery, snapshots: Snapshots, family: Family, lives: Lives
    ) -> None:
        self._residents, self._recovery, self._snapshots = residents, recovery, snapshots
        self._family, self._lives = family, lives
        self._restoring: dict[Point, asyncio.Task[Restored]] = {}
        self._making_room = False

    @asynccontextmanager
    async def use(self, live: Live, home: Point) -> AsyncIterator[Pinned]:
        """The state at ``home``, held while inside."""
        pinned = await self._pin(live, home)
        try:
            yield pinned
        except UnknownHandle:
            self._residents.drop(pinned.resident)  # the engine has lost it: the next use restores
            raise
        finally:
            self._residents.unpin(pinned.resident)

    def new_handle(self) -> str:
        return self._residents.new_handle()

    async def move(
        self, live: Live, base: Resident, home: Point, handle: str, saved: bool = False
    ) -> Resident:
        """The session has moved from ``base`` to ``home``, whose state is ``handle``; ``saved``: with a
        snapshot."""
        point = canonical(home, await self._family(live.session))
        resident = self._residents.adopt(
            Resident(point, home, handle, home.tokens if saved else base.saved, claims={live.id})
        )
        if base is not resident:
            self._residents.disclaim(base, live.id)
        self._snapshots.consider(live, resident)
        return resident

    async def holds(self, live: Live, home: Point) -> bool:
        return self._residents.find(canonical(home, await self._family(live.session))) is not None

    async def keep_only(self, live: Live, home: Point) -> None:
        """Of all states that were kept for the session, keep the one at ``home``."""
        point = canonical(home, await self._family(live.session))
        for resident in self._residents.all():
            if resident.point != point:
                self._residents.disclaim(resident, live.id)

    def let_go(self, live: Live) -> None:
        """Forget what is held for a session: another server has moved it, or it is gone."""
        for resident in self._residents.all():
            self._residents.disclaim(resident, live.id)

    async def share(self, live: Live, home: Point, with_session: str) -> None:
        """A fork begins at ``home``: what is held of it stays for the fork too."""
        held = self._residents.find(canonical(home, await self._family(live.session)))
        if held is not None:
            held.claims.add(with_session)

    async def make_room(self) -> None:
        """Save and let go of the least recently used states until there is room."""
        if self._making_room:
            return
        self._making_room = True
        try:
            for resident in self._residents.surplus():
                await self._snapshots.save_before_leaving(
                    await self._lives(resident.home.session_id), resident
                )
                if not resident.pins:
                    self._residents.drop(resident)
        finally:
            self._making_room = False

    async def _pin(self, live: Live, home: Point) -> Pinned:
        point = canonical(home, await self._family(live.session))
        if point.tokens == 0:
            return Pinned(Resident(point, home, INITIAL, 0), 0)
        recomputed = 0
        while (held := self._residents.find(point)) is None:
            restored = await self._restore(live, home, point)
            recomputed += restored.recomputed_tokens
        self._residents.pin(held)
        return Pinned(held, recomputed)

    async def _restore(self, live: Live, home: Point, point: Point) -> Restored:
        task = self._restoring.get(point)
        if task is None:
            task = asyncio.create_task(self._restore_now(live, home))
            self._restoring[point] = task
            task.add_done_callback(lambda _: self._restoring.pop(point, None))
        # Shielded: others may wait for the same state when this caller leaves.
        return await asyncio.shield(task)

    async def _restore_now(self, live: Live, home: Point) -> Restored:
        family = await self._family(live.session)
        await self.make_room()  # whoever asked for one state after the other would be refused at last
        try:
            restored = await self._recovery.restore(home, family, live.session.created.tenant)
        except MnemosyneError as error:
            live.events.add("error", told(error))
            raise
        self._residents.adopt(restored.resident)
        if restored.refused:
            live.trouble = "degraded"
        live.events.add(
            "tier",
            {
                "tier": "device",
                "tokens_seen": home.tokens,
                "reused_tokens": restored.reused_tokens,
                "recomputed_tokens": restored.recomputed_tokens,
                "refused_snapshots": [
                    {"session_id": r.session_id, "log_offset": r.index, "code": r.error, "message": r.message}
                    for r in restored.refused
                ],
            },
        )
        return restored
