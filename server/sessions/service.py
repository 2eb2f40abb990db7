"""The session service: what a server does with sessions, put together. Knows no HTTP and no tensor.

Every method takes the tenant first; a session of another tenant is SessionNotFound like one that never was.
Methods raise classes of ``engine.errors`` alone. All belong to the event loop that ``start`` ran on.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import EngineUnavailable, MnemosyneError, SessionNotFound
from mnemosyne.engine.interface import EngineLike
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.absorber import Absorber
from mnemosyne.server.sessions.core import Core
from mnemosyne.server.sessions.deletion import Deletion
from mnemosyne.server.sessions.documents import Documents
from mnemosyne.server.sessions.overview import overview
from mnemosyne.server.sessions.settings import ServiceSettings
from mnemosyne.server.sessions.surprise import Surprise
from mnemosyne.server.sessions.tokens import TextTokenizer
from mnemosyne.server.sessions.transfer import Transfer
from mnemosyne.server.sessions.turns import Turns
from mnemosyne.server.sessions.turnstream import TurnStream
from mnemosyne.server.sessions.versions import Versions
from mnemosyne.server.sessions.views import (
    DocumentInfo,
    Idempotency,
    Receipt,
    SessionEvent,
    SessionInfo,
    SurpriseTrace,
    TurnRequest,
    VersionInfo,
)

__all__ = ["ServiceSettings", "SessionService"]

log = logging.getLogger(__name__)
SWEEP_AGAIN_SECONDS = 1.0
TEND_SECONDS = 60.0
"""How often sessions in memory are looked at for their expiry."""


class SessionService:
    def __init__(
        self, store: SessionStore, engine: EngineLike, tokenizer: TextTokenizer, settings: ServiceSettings
    ) -> None:
        self._core = Core(store, engine, tokenizer, settings)
        self._turns = Turns(self._core)
        self._absorber = Absorber(self._core)
        self._documents = Documents(self._core, self._absorber)
        self._versions = Versions(self._core)
        self._deletion = Deletion(self._core, self._turns, self._absorber)
        self._transfer = Transfer(self._core, self._versions)
        self._surprise = Surprise(self._core)

    # -- life
    async def start(self, tenants: Iterable[str]) -> None:
        """Begin to serve, and in the background take up documents that a crash left unread. The engine is
        started."""
        self._core.spawn(self._tend(list(tenants)), "looking after sessions")

    async def drain(self, grace_seconds: float = 5.0) -> None:
        """Take no new work (EngineUnavailable), let turns end for ``grace_seconds``, stop documents at the
        end of a piece, save every state."""
        core = self._core
        core.draining = True
        await self._turns.settle(grace_seconds)
        await self._absorber.settle()
        await core.stop_background()
        await core.snapshots.settle()
        for resident in core.residents.all():
            with suppress(MnemosyneError):  # a store that is away: the log has it all
                live = await core.registry.find(resident.home.session_id)
                await core.snapshots.save_before_leaving(live, resident)
            core.residents.drop(resident)
        for live in core.registry.all():
            live.events.end()

    async def check(self) -> None:
        """Raise StoreUnavailable or EngineUnavailable unless work can be done now."""
        if not self._core.engine.ready:
            raise EngineUnavailable("the engine isn't ready", retry_after=5)
        await asyncio.to_thread(self._core.store.check)

    def stats(self) -> dict[str, float]:
        """Gauges and counters: sessions_resident, documents_active, turns_active, snapshots_written_total,
        restores_total, restore_refused_total, tokens_replayed_total, tokens_absorbed_total,
        lease_lost_total, tokens_unsaved (what a restore would replay)."""
        core = self._core
        return {
            "sessions_resident": len(core.residents),
            "sessions_known": len(core.registry),
            "documents_active": self._absorber.active,
            "turns_active": self._turns.running,
            "tokens_absorbed_total": self._absorber.tokens,
            "snapshots_written_total": core.snapshots.written,
            "restores_total": core.recovery.restores,
            "restore_refused_total": core.recovery.refusals,
            "tokens_replayed_total": core.recovery.replayed,
            "lease_lost_total": core.leases_lost,
            "tokens_unsaved": sum(resident.replay for resident in core.residents.all()),
            "ingest_tokens_per_second": core.pace.tokens_per_second,
        }

    # -- sessions
    async def create(
        self,
        tenant: str,
        *,
        metadata: dict[str, Any] | None = None,
        ttl_seconds: float | None = None,
        retain_input: bool = True,
        idempotency: Idempotency | None = None,
    ) -> SessionInfo:
        self._core.admit()
        if (before := await self._versions.made_before(tenant, idempotency)) is not None:
            return before
        expires_at = _expiry(ttl_seconds)
        return await self._versions.create(tenant, metadata or {}, expires_at, retain_input, idempotency)

    async def list(self, tenant: str, *, limit: int = 20, after: str | None = None) -> list[SessionInfo]:
        """Oldest first, after the session ``after``."""
        found: list[SessionInfo] = []
        while len(found) < limit:
            ids = await asyncio.to_thread(self._core.store.list_sessions, tenant, after, limit - len(found))
            if not ids:
                break
            after = ids[-1]
            for session_id in ids:
                with suppress(SessionNotFound):
                    found.append(await self.get(tenant, session_id))
        return found

    async def get(self, tenant: str, session_id: str) -> SessionInfo:
        return await overview(self._core, await self._core.registry.get(tenant, session_id))

    async def patch(
        self,
        tenant: str,
        session_id: str,
        *,
        metadata: dict[str, Any] | None = None,
        ttl_seconds: float | None = None,
        clear_expiry: bool = False,
    ) -> SessionInfo:
        """Replace the metadata, set the expiry to ``ttl_seconds`` from now, or remove it. Moves no
        version."""
        live = await self._core.registry.get(tenant, session_id)
        async with self._core.writing(live) as held:
            session = live.session
            kept = None if clear_expiry else session.expires_at
            record = records.Patched(
                at=time.time(),
                metadata=session.metadata if metadata is None else metadata,
                expires_at=kept if ttl_seconds is None else _expiry(ttl_seconds),
            )
            await live.append([record], held.fence)
        return await overview(self._core, live)

    async def delete(self, tenant: str, session_id: str, *, erase: bool = False) -> Receipt:
        """Forget a session. Bytes that forks need stay until the last fork goes; ``erase`` takes the forks
        too."""
        return await self._deletion.delete(await self._core.registry.get(tenant, session_id), erase)

    # -- versions
    async def versions(self, tenant: str, session_id: str) -> builtins.list[VersionInfo]:
        return await self._versions.all(await self._core.registry.get(tenant, session_id))

    async def name_version(
        self,
        tenant: str,
        session_id: str,
        *,
        name: str,
        if_match: int | None = None,
        idempotency: Idempotency | None = None,
    ) -> VersionInfo:
        """Name the newest version and keep its snapshot."""
        live = await self._core.registry.get(tenant, session_id)
        return await self._versions.name(live, name, if_match, idempotency)

    async def delete_version(self, tenant: str, session_id: str, version: int) -> None:
        """Take a version from the list, with its name and snapshot. The newest one can't be
        (RequestError)."""
        await self._versions.delete(await self._core.registry.get(tenant, session_id), version)

    async def fork(
        self,
        tenant: str,
        session_id: str,
        *,
        version: int | None = None,
        idempotency: Idempotency | None = None,
    ) -> SessionInfo:
        """A new session that begins as ``version`` (None the newest); it outlives its parent."""
        live = await self._core.registry.get(tenant, session_id)
        return await self._versions.fork(live, version, idempotency)

    async def rewind(
        self,
        tenant: str,
        session_id: str,
        *,
        version: int | None = None,
        tokens_seen: int | None = None,
        if_match: int | None = None,
        idempotency: Idempotency | None = None,
    ) -> SessionInfo:
        """A new version equal to an older one, or to the first ``tokens_seen`` tokens of the newest. Exactly
        one."""
        live = await self._core.registry.get(tenant, session_id)
        return await self._versions.rewind(live, version, tokens_seen, if_match, idempotency)

    # -- turns
    async def turn(self, tenant: str, session_id: str, request: TurnRequest) -> TurnStream:
        """Admit a turn and begin it; iterate the stream for Delta..., Answer. Refusals (busy, mismatch,
        unknown version) are raised here, failures of the run while iterating. ``aclose`` the stream when the
        client leaves: an unkeyed turn is cancelled without a trace, a keyed one goes on."""
        return await self._turns.begin(await self._core.registry.get(tenant, session_id), request)

    async def complete(self, tenant: str, request: TurnRequest) -> TurnStream:
        """A completion without a session; leaves no trace."""
        return await self._turns.begin_stateless(tenant, request)

    async def cancel(self, tenant: str, session_id: str) -> int:
        """Cancel the running turns and the documents that aren't absorbed; returns how many."""
        live = await self._core.registry.get(tenant, session_id)
        cancelled = await self._turns.cancel(live)
        for document in [d for d in live.session.documents.values() if not d.ended]:
            await self._documents.cancel(live, document)
            cancelled += 1
        return cancelled

    # -- documents
    async def create_document(
        self,
        tenant: str,
        session_id: str,
        *,
        name: str,
        content_type: str = "text/plain",
        length: int | None = None,
        sha256: str | None = None,
        text: str | None = None,
        tokens: tuple[int, ...] | None = None,
        if_match: int | None = None,
        idempotency: Idempotency | None = None,
    ) -> DocumentInfo:
        """Announce a document; with ``text`` or ``tokens`` it is whole at once (status ``queued``)."""
        live = await self._core.registry.get(tenant, session_id)
        return await self._documents.create(
            live,
            name=name,
            content_type=content_type,
            length=length,
            sha256=sha256,
            text=text,
            tokens=tokens,
            if_match=if_match,
            idempotency=idempotency,
        )

    async def append_document(
        self,
        tenant: str,
        session_id: str,
        document_id: str,
        *,
        offset: int,
        data: bytes,
        complete: bool = False,
    ) -> DocumentInfo:
        """Add bytes at ``offset`` (OffsetMismatch with attribute ``offset`` otherwise); durable on return.
        ``complete`` ends it: DocumentRejected if length, checksum or UTF-8 are wrong."""
        live = await self._core.registry.get(tenant, session_id)
        return await self._documents.append(live, document_id, offset=offset, data=data, complete=complete)

    async def documents(self, tenant: str, session_id: str) -> builtins.list[DocumentInfo]:
        return await self._documents.all(await self._core.registry.get(tenant, session_id))

    async def document(self, tenant: str, session_id: str, document_id: str) -> DocumentInfo:
        live = await self._core.registry.get(tenant, session_id)
        return await self._documents.info(live, live.session.document(document_id))

    async def cancel_document(self, tenant: str, session_id: str, document_id: str) -> DocumentInfo:
        """Stop and forget a document that isn't absorbed; an absorbed one is RequestError (rewind
        instead)."""
        live = await self._core.registry.get(tenant, session_id)
        return await self._documents.cancel(live, live.session.document(document_id))

    # -- the rest
    async def events(
        self, tenant: str, session_id: str, *, last_event_id: int | None = None
    ) -> AsyncIterator[SessionEvent]:
        """Events after ``last_event_id`` (None: from now on) without end, until the caller closes it, the
        session is deleted or the service drains. Kept in memory by this process, the newest thousand."""
        live = await self._core.registry.get(tenant, session_id)
        async for event in live.events.follow(last_event_id):
            yield event

    async def transcript(self, tenant: str, session_id: str) -> builtins.list[dict[str, Any]]:
        """What was read and said, in order: {kind: input|generated|document, version, text, tokens}."""
        return await self._transfer.transcript(await self._core.registry.get(tenant, session_id))

    async def export_state(
        self, tenant: str, session_id: str, *, version: int | None = None, log: bool = False
    ) -> bytes:
        """The state as one safetensors file; with ``log`` a zip of ``state.safetensors`` and
        ``log.jsonl``."""
        live = await self._core.registry.get(tenant, session_id)
        return await self._transfer.export(live, version, log)

    async def import_state(
        self, tenant: str, session_id: str, data: bytes, *, if_match: int | None = None
    ) -> SessionInfo:
        """Make an exported state the newest version. Raises SnapshotCorrupt, SnapshotUnsupported or
        StateIncompatible. What it read isn't in this session's log, so a rewind can't go into it."""
        live = await self._core.registry.get(tenant, session_id)
        await self._transfer.import_state(live, data, if_match)
        return await overview(self._core, live)

    async def surprise(
        self,
        tenant: str,
        session_id: str,
        *,
        first: int = 0,
        last: int | None = None,
        resolution: int | None = None,
        version: int | None = None,
        text: bool = False,
    ) -> SurpriseTrace:
        """What reading the tokens [first, last) did to the memory of a version (None: the newest commit), at
        about ``resolution`` tokens a point; below a chunk's length they are computed again from the input.
        ``text``: with what was read there. Raises RequestError for a range that is too long for it, and where
        the input isn't kept."""
        live = await self._core.registry.get(tenant, session_id)
        return await self._surprise.read(live, first, last, resolution, version, text)

    async def _tend(self, tenants: Iterable[str]) -> None:
        """Once look at every session, then now and then at those in memory."""
        while True:
            try:
                await self._deletion.sweep(tenants)
                break
            except MnemosyneError as error:  # a store that is away: what it holds must not wait for good
                log.warning("the sessions can't be looked through yet: %s", error.message)
                await asyncio.sleep(SWEEP_AGAIN_SECONDS)
        while True:
            await asyncio.sleep(TEND_SECONDS)
            for live in self._core.registry.all():
                with suppress(MnemosyneError):
                    await self._core.registry.get(live.session.created.tenant, live.id)


def _expiry(ttl_seconds: float | None) -> float | None:
    return None if ttl_seconds is None else time.time() + ttl_seconds
