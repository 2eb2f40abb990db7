"""Forgetting sessions. Owns which bytes must stay for forks, and expiry; knows no turn.

A fork's log is a link into its parent's. A deleted session whose forks live is gone for its tenant at once;
its bytes go with the last of them. ``erase`` takes the forks too, so that no byte of what was read is left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

from mnemosyne.engine.errors import MnemosyneError, SessionBusy, SessionNotFound
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.absorber import Absorber
from mnemosyne.server.sessions.core import Core
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.turns import Turns
from mnemosyne.server.sessions.views import Receipt

log = logging.getLogger(__name__)
_ALL = 1 << 31


class Deletion:
    def __init__(self, core: Core, turns: Turns, absorber: Absorber) -> None:
        self._core, self._turns, self._absorber = core, turns, absorber
        self._expiring: set[str] = set()
        core.registry.on_expired.append(self._expire)

    async def delete(self, live: Live, erase: bool) -> Receipt:
        """See ``SessionService.delete``."""
        erased: list[str] = []
        removed: Counter[str] = Counter()
        forks = await self._delete(live, erase, erased, removed)
        await self._erase_forebears(live, erased, removed)
        return Receipt(session_ids=tuple(erased), kept_for_forks=forks, removed=dict(removed))

    async def sweep(self, tenants: Iterable[str]) -> None:
        """Look at every session once: wake what a crash left unread, finish deletions, let expired ones
        go."""
        for tenant in tenants:
            for session_id in await self._ids(tenant):
                try:
                    live = await self._core.registry.find(session_id)
                    if live is not None and live.session.deleted:
                        await self._erase_unless_needed(live, [], Counter())
                    elif live is not None:
                        await self._core.registry.get(tenant, session_id)
                except SessionNotFound:
                    continue
                except MnemosyneError as error:
                    log.warning("session %s: %s", session_id, error.message)

    async def _delete(self, live: Live, erase: bool, erased: list[str], removed: Counter[str]) -> bool:
        """Delete one session; returns whether its bytes stay for forks."""
        await self._turns.cancel(live)
        async with self._absorber.stopped(live):
            if not live.session.deleted:
                async with self._core.writing(live) as held:
                    await live.append([records.Deleted(at=time.time())], held.fence)
        live.events.end()
        self._core.states.let_go(live)
        if erase:
            for fork_id in await self._forks(live):
                fork = await self._core.registry.find(fork_id)
                if fork is not None:
                    await self._delete(fork, True, erased, removed)
        return not await self._erase_unless_needed(live, erased, removed)

    async def _erase_unless_needed(self, live: Live, erased: list[str], removed: Counter[str]) -> bool:
        """Erase a deleted session unless a fork needs it; returns whether it is gone."""
        if await self._forks(live):
            return False
        async with self._core.leases.hold(live.id) as held:
            removed.update(await asyncio.to_thread(self._core.store.erase, live.id, held.fence))
        self._core.registry.forget(live.id)
        erased.append(live.id)
        return True

    async def _erase_forebears(self, live: Live, erased: list[str], removed: Counter[str]) -> None:
        """Deleted sessions that only this one still needed."""
        while live.id in erased and live.session.created.parent is not None:
            parent = await self._core.registry.find(live.session.created.parent.point.session_id)
            if parent is None or not parent.session.deleted:
                return
            await self._erase_unless_needed(parent, erased, removed)
            live = parent

    async def _forks(self, live: Live) -> list[str]:
        """Sessions whose log begins in this one's, deleted ones that are still kept included."""
        ids = await self._ids(live.session.created.tenant)
        store = self._core.store

        def look() -> list[str]:
            found = []
            for session_id in ids:
                with suppress(SessionNotFound):
                    created = records.parse(next(iter(store.read(session_id))))
                    parent = created.parent if isinstance(created, records.Created) else None
                    if parent is not None and parent.point.session_id == live.id:
                        found.append(session_id)
            return found

        return await asyncio.to_thread(look)

    async def _ids(self, tenant: str) -> list[str]:
        """Every session of a tenant whose bytes are there; in one call, so that none is missed in between."""
        return await asyncio.to_thread(self._core.store.list_sessions, tenant, None, _ALL)

    def _expire(self, live: Live) -> None:
        if live.id not in self._expiring and not self._core.draining:
            self._expiring.add(live.id)
            self._core.spawn(self._delete_expired(live), f"deleting expired {live.id}")

    async def _delete_expired(self, live: Live) -> None:
        try:
            await self.delete(live, False)
        except (SessionBusy, SessionNotFound):
            pass  # another server is at it
        finally:
            self._expiring.discard(live.id)
