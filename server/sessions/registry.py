"""The sessions that this process knows. Owns finding, keeping and forgetting them, and that tenants don't
cross."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import SessionNotFound
from mnemosyne.server.sessions.leases import Leases
from mnemosyne.server.sessions.lineage import Session
from mnemosyne.server.sessions.live import Live

KEPT = 1024
"""Idle sessions whose lineage stays in memory."""


class Registry:
    def __init__(self, store: SessionStore, leases: Leases) -> None:
        self._store, self._leases = store, leases
        self._lives: OrderedDict[str, Live] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Live]] = {}
        self.on_found: list[Callable[[Live], None]] = []
        """Called with each session that is looked up for its tenant, level with its journal."""
        self.on_expired: list[Callable[[Live], None]] = []

    def __len__(self) -> int:
        return len(self._lives)

    def all(self) -> list[Live]:
        return list(self._lives.values())

    async def get(self, tenant: str, session_id: str) -> Live:
        """A session of this tenant, level with its journal. Raises SessionNotFound for any other."""
        live = await self.find(session_id)
        if live is None or live.session.created.tenant != tenant or live.session.deleted:
            raise SessionNotFound("no such session")
        expires_at = live.session.expires_at
        if expires_at is not None and expires_at <= time.time():
            for hook in self.on_expired:
                hook(live)
            raise SessionNotFound("no such session")
        for hook in self.on_found:
            hook(live)
        return live

    async def find(self, session_id: str) -> Live | None:
        """A session of any tenant, deleted or not, level with its journal; None if its bytes are gone."""
        try:
            live = self._lives.get(session_id)
            if live is None:
                return await self._load(session_id)
            self._lives.move_to_end(session_id)
            if not self._leases.holds(session_id):
                await live.refresh()
            return live
        except SessionNotFound:
            self.forget(session_id)
            return None

    async def family(self, session: Session) -> Mapping[str, Session]:
        """The session and its forebears, by id."""
        found = {session.id: session}
        while session.created.parent is not None:
            began = session.created.parent.point
            parent_id = began.session_id
            live = self._lives.get(parent_id) or await self._load(parent_id)
            if began.index not in live.session.commits:
                await live.refresh()
            session = found[parent_id] = live.session
        return found

    def forget(self, session_id: str) -> Live | None:
        """Drop what is in memory; the journal says it all again."""
        live = self._lives.pop(session_id, None)
        if live is not None:
            live.forgotten = True
            live.events.end()
        return live

    async def _load(self, session_id: str) -> Live:
        task = self._loading.get(session_id)
        if task is None:
            task = asyncio.create_task(self._load_now(session_id))
            self._loading[session_id] = task
            task.add_done_callback(lambda _: self._loading.pop(session_id, None))
        return await asyncio.shield(task)

    async def _load_now(self, session_id: str) -> Live:
        live = await Live.load(self._store, session_id)
        self._lives[session_id] = live
        if len(self._lives) > KEPT:
            for other_id, other in list(self._lives.items()):
                if other.idle and other is not live:
                    self.forget(other_id)
                    break
        return live
