"""What all operations on sessions share: the parts, put together, and the two ways to hold a session for a
change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import (
    EngineUnavailable,
    LeaseLost,
    SessionBusy,
    SessionNotFound,
    StateIncompatible,
    VersionMismatch,
)
from mnemosyne.engine.interface import EngineLike
from mnemosyne.server.sessions.leases import Held, Leases
from mnemosyne.server.sessions.lineage import Session, Version
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.pace import Pace
from mnemosyne.server.sessions.recovery import Recovery
from mnemosyne.server.sessions.registry import Registry
from mnemosyne.server.sessions.residents import Residents
from mnemosyne.server.sessions.settings import ServiceSettings
from mnemosyne.server.sessions.snapshots import Snapshots
from mnemosyne.server.sessions.states import States
from mnemosyne.server.sessions.tokens import TextTokenizer

log = logging.getLogger(__name__)
BUSY_RETRY_SECONDS = 2.0


class Core:
    def __init__(
        self, store: SessionStore, engine: EngineLike, tokenizer: TextTokenizer, settings: ServiceSettings
    ) -> None:
        """``engine`` has started."""
        self.store, self.engine, self.tokenizer, self.settings = store, engine, tokenizer, settings
        self.pace = Pace()
        capacity = max(4, settings.resident_bytes // max(1, engine.info.state_bytes))
        self.residents = Residents(engine, capacity)
        self.leases = Leases(store, settings.owner, settings.lease_seconds, self._lost)
        self.registry = Registry(store, self.leases)
        self.recovery = Recovery(store, engine, self.residents, self.pace)
        self.snapshots = Snapshots(
            store, engine, self.residents, self.leases, self.pace, settings.replay_seconds
        )
        self.states = States(
            self.residents, self.recovery, self.snapshots, self.registry.family, self.registry.find
        )
        self.draining = False
        self.leases_lost = 0
        self._background: set[asyncio.Task[Any]] = set()
        engine.on_lost(self.residents.forget_lost)

    def admit(self) -> None:
        """Raise EngineUnavailable once the service drains."""
        if self.draining:
            raise EngineUnavailable("this server is shutting down", code="draining", retry_after=5)

    def check_weights(self, session: Session) -> None:
        """Raise StateIncompatible if the session was made under other weights than those served."""
        served = self.engine.info.model_fingerprint
        if session.created.fingerprint != served:
            raise StateIncompatible(
                "the session was made under other weights than those served",
                session_model=session.created.fingerprint,
                model=served,
            )

    @asynccontextmanager
    async def writing(self, live: Live) -> AsyncIterator[Held]:
        """Own the session's lease, level with its journal. Raises SessionBusy while another server owns
        it."""
        async with self.leases.hold(live.id) as held:
            await live.refresh()
            if live.session.deleted:
                raise SessionNotFound("no such session")
            if live.forgotten:
                raise LeaseLost("the session was taken over meanwhile; nothing was changed", retry_after=1)
            try:
                yield held
            except LeaseLost:
                self._lost(live.id)
                raise

    @asynccontextmanager
    async def moving(self, live: Live, if_match: int | None = None) -> AsyncIterator[Held]:
        """Be the one that moves the session's newest version. Raises SessionBusy, VersionMismatch."""
        self.admit()
        self.check_free(live)
        async with live.writer, self.writing(live) as held:
            self.check_free(live, itself=True)
            check_match(live, if_match)
            yield held

    def check_free(self, live: Live, itself: bool = False) -> None:
        """Raise SessionBusy while a turn runs (but the caller's own) or a document waits or is being read."""
        document = live.session.pending
        if document is not None:
            raise SessionBusy(
                f"document {document.id} is being read; a turn with learn: false can be asked meanwhile",
                retry_after=BUSY_RETRY_SECONDS,
                document=document.id,
            )
        if live.writer.locked() and not (itself or live.settling):
            raise SessionBusy("another turn or change of this session is running", retry_after=1.0)

    def told(self, live: Live, version: Version) -> None:
        """Say on the session's events that there is a new version."""
        live.events.add(
            "version",
            {"version": version.number, "tokens_seen": version.tokens, "made_by": version.made_by},
        )

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something beside; its failure is logged."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    async def make_room(self) -> None:
        await self.states.make_room()

    async def stop_background(self) -> None:
        for task in self._background:
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    def _lost(self, session_id: str) -> None:
        """Another server has the session: what is in memory is of before."""
        self.leases_lost += 1
        log.warning("the lease of session %s was lost", session_id)
        live = self.registry.forget(session_id)
        if live is not None:
            self.states.let_go(live)
            if live.absorber is not None and live.absorber is not asyncio.current_task():
                live.absorber.cancel()


def check_match(live: Live, if_match: int | None) -> None:
    """Raise VersionMismatch unless ``if_match`` is the newest version, or None."""
    newest = live.session.newest.number
    if if_match is not None and if_match != newest:
        raise VersionMismatch(f"the newest version is {newest}, not {if_match}", version=newest)
