"""Making sessions and moving between their versions: create, fork, rewind, name. Knows no turn and no
document."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import replace
from typing import Any

from mnemosyne.engine.errors import RequestError, SessionNotFound, VersionNotFound
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.core import Core
from mnemosyne.server.sessions.idempotency import first_answer, reply, same_body, scope
from mnemosyne.server.sessions.lineage import Version
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.overview import given_before, overview
from mnemosyne.server.sessions.paths import cut
from mnemosyne.server.sessions.records import Created, Parent
from mnemosyne.server.sessions.views import (
    Idempotency,
    ParentInfo,
    SessionInfo,
    VersionInfo,
    to_json,
)


class Versions:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def create(
        self,
        tenant: str,
        metadata: dict[str, Any],
        expires_at: float | None,
        retain_input: bool,
        idempotency: Idempotency | None,
        parent: Parent | None = None,
    ) -> SessionInfo:
        """A session that has read nothing, or with ``parent`` a fork."""
        engine = self._core.engine.info
        created = Created(
            at=time.time(),
            session_id=f"sess_{secrets.token_hex(16)}",
            tenant=tenant,
            model=self._core.settings.model,
            fingerprint=engine.model_fingerprint,
            metadata=metadata,
            expires_at=expires_at,
            retain_input=retain_input,
            parent=parent,
        )
        first = records.to_bytes(created)
        info = SessionInfo(
            id=created.session_id,
            model=created.model,
            version=1,
            tokens_seen=parent.point.tokens if parent else 0,
            state_bytes=engine.state_bytes,
            stored_bytes=len(first),
            tier="device" if parent is None else "store",
            parent=ParentInfo(session_id=parent.point.session_id, version=parent.version) if parent else None,
            fingerprint=created.fingerprint,
            created_at=created.at,
            expires_at=expires_at,
            retain_input=retain_input,
            metadata=metadata,
            health="ok",
        )
        key = scope(tenant, idempotency) if idempotency else None
        value = json.dumps([idempotency.body_hash if idempotency else "", to_json(info)]).encode()
        entry = (key, value) if key is not None else None
        made = await asyncio.to_thread(self._core.store.create, created.session_id, tenant, first, entry)
        if not made and idempotency is not None:
            return await self.made_before(tenant, idempotency) or info
        return info

    async def made_before(self, tenant: str, idempotency: Idempotency | None) -> SessionInfo | None:
        """The session that the first request under this key made."""
        if idempotency is None:
            return None
        data = await asyncio.to_thread(self._core.store.get_idempotent, scope(tenant, idempotency))
        if data is None:
            return None
        body_hash, info = json.loads(data)
        same_body(body_hash, idempotency)
        return given_before(info)

    async def fork(self, live: Live, version: int | None, idempotency: Idempotency | None) -> SessionInfo:
        """See ``SessionService.fork``. The fork's log is a link to the parent's, so it costs nothing."""
        self._core.admit()
        self._core.check_weights(live.session)
        session = live.session
        tenant = session.created.tenant
        if (before := await self.made_before(tenant, idempotency)) is not None:
            return before
        number = session.newest.number if version is None else version
        point = session.point(number)
        retain = session.created.retain_input
        data = None if retain or not point.tokens else await self.export(live, number)
        parent = Parent(number, point)
        info = await self.create(
            tenant, dict(session.metadata), session.expires_at, retain, idempotency, parent
        )
        # A deletion that looked for forks before this one was there has taken the bytes, or is about to.
        parent_now = await self._core.registry.find(live.id)
        if parent_now is None or parent_now.session.deleted:
            async with self._core.leases.hold(info.id) as held:
                await asyncio.to_thread(self._core.store.erase, info.id, held.fence)
            raise SessionNotFound("no such session")
        if data is not None:
            async with self._core.leases.hold(info.id) as held:
                await asyncio.to_thread(self._core.store.put_snapshot, info.id, 0, data, held.fence)
        await self._core.states.share(live, point, info.id)
        held_now = await self._core.states.holds(live, point)
        return replace(info, tier="device" if held_now else "store")

    async def rewind(
        self,
        live: Live,
        version: int | None,
        tokens_seen: int | None,
        if_match: int | None,
        idempotency: Idempotency | None,
    ) -> SessionInfo:
        """See ``SessionService.rewind``."""
        if (version is None) == (tokens_seen is None):
            raise RequestError("give either version or tokens_seen", param="version")
        self._core.check_weights(live.session)
        tenant = live.session.created.tenant
        if (payload := await first_answer(live, tenant, idempotency)) is not None:
            return given_before(payload)
        async with self._core.moving(live, if_match) as held:
            if (payload := await first_answer(live, tenant, idempotency)) is not None:
                return given_before(payload)
            session = live.session
            if version is not None:
                target = session.point(version)
            else:
                assert tokens_seen is not None
                target = cut(session.point(), tokens_seen, await self._core.registry.family(session))
            # Restored first: a version that can't be brought back must not become the newest.
            async with self._core.states.use(live, target) as pinned:
                number = session.newest.number + 1
                info = replace(
                    await overview(self._core, live), version=number, tokens_seen=target.tokens, tier="device"
                )
                kept = reply(tenant, idempotency, to_json(info))
                record = records.Rewound(at=time.time(), version=number, target=target, reply=kept)
                by_log = session.created.retain_input or not target.tokens
                snapshot = None if by_log else await self._core.engine.export(pinned.handle)
                await live.append([record], held.fence, snapshot)
                await self._core.states.keep_only(live, session.point())
                if pinned.resident.point.tokens:
                    pinned.resident.claims.add(live.id)
                if version is None:
                    # Inside a record there is no place for a snapshot; the rewind's own record is one.
                    pinned.resident.home = session.point()
        self._core.told(live, live.session.newest)
        return info

    async def name(
        self, live: Live, name: str, if_match: int | None, idempotency: Idempotency | None
    ) -> VersionInfo:
        """See ``SessionService.name_version``."""
        if not name:
            raise RequestError("a version's name can't be empty", param="name")
        self._core.check_weights(live.session)
        tenant = live.session.created.tenant
        if (payload := await first_answer(live, tenant, idempotency)) is not None:
            return VersionInfo(**payload)
        async with self._core.moving(live, if_match) as held:
            if (payload := await first_answer(live, tenant, idempotency)) is not None:
                return VersionInfo(**payload)
            version = live.session.newest
            async with self._core.states.use(live, live.session.point()) as pinned:
                if version.tokens:
                    data = await self._core.engine.export(pinned.handle)
                    await asyncio.to_thread(
                        self._core.store.put_snapshot, live.id, version.index, data, held.fence
                    )
                    pinned.resident.saved = version.tokens
            info = _info(replace(version, name=name), True)
            kept = reply(tenant, idempotency, to_json(info))
            record = records.VersionNamed(at=time.time(), version=version.number, name=name, reply=kept)
            await live.append([record], held.fence)
        return info

    async def delete(self, live: Live, number: int) -> None:
        """See ``SessionService.delete_version``."""
        async with self._core.writing(live) as held:
            session = live.session
            version = session.versions.get(number)
            if version is None:
                raise VersionNotFound(f"the session has no version {number}", version=number)
            if version is session.newest:
                raise RequestError("the newest version can't be deleted; rewind first", param="version")
            await live.append([records.VersionDeleted(at=time.time(), version=number)], held.fence)
            await self._core.snapshots.thin(session, held)

    async def all(self, live: Live) -> list[VersionInfo]:
        refs = await asyncio.to_thread(self._core.store.list_snapshots, live.id)
        kept = {ref.version for ref in refs}
        return [_info(v, v.index in kept or not v.tokens) for v in live.session.versions.values()]

    async def export(self, live: Live, version: int | None) -> bytes:
        """The state of a version as a file."""
        self._core.check_weights(live.session)
        async with self._core.states.use(live, live.session.point(version)) as pinned:
            return await self._core.engine.export(pinned.handle)


def _info(version: Version, snapshot: bool) -> VersionInfo:
    return VersionInfo(
        version=version.number,
        tokens_seen=version.tokens,
        log_offset=version.log_offset,
        created_at=version.created_at,
        made_by=version.made_by,
        name=version.name,
        snapshot=snapshot,
    )
