"""Sessions and their versions: make, list, read, change, fork, rewind, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from mnemosyne.server.deps import (
    IdempotencyKey,
    IfMatch,
    RuntimeDep,
    ServiceDep,
    SessionPath,
    Tenant,
    body_of,
    check_model,
    idempotency,
    name_ignored,
    needs_json,
    tag,
)
from mnemosyne.server.schemas.common import failures
from mnemosyne.server.schemas.sessions import (
    Cancelled,
    CreateSession,
    Fork,
    NameVersion,
    PatchSession,
    Rewind,
    SessionList,
    TranscriptList,
    VersionList,
)
from mnemosyne.server.sessions.views import Receipt, SessionInfo, VersionInfo

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], dependencies=[Depends(needs_json)])
READ = failures(404)
CHANGE = failures(404, 409, 412, 415, 422)


@router.post("", response_model=SessionInfo, status_code=201, responses=CHANGE)
async def create_session(
    request: Request,
    response: Response,
    runtime: RuntimeDep,
    service: ServiceDep,
    tenant: Tenant,
    key: IdempotencyKey,
    body: CreateSession | None = None,
) -> SessionInfo:
    """Make a session that has read nothing."""
    body = body or CreateSession()
    check_model(runtime, body.model)
    await runtime.limits.admit_session(tenant)
    info = await service.create(
        tenant,
        metadata=body.metadata,
        ttl_seconds=body.ttl_seconds,
        retain_input=body.retain_input,
        idempotency=idempotency(request, key, body_of(body)),
    )
    name_ignored(response, body)
    return _made(response, info)


@router.get("", response_model=SessionList, responses=READ)
async def list_sessions(
    service: ServiceDep,
    tenant: Tenant,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
) -> SessionList:
    """This tenant's sessions, oldest first."""
    found = await service.list(tenant, limit=limit + 1, after=after)
    return SessionList(data=found[:limit], has_more=len(found) > limit)


@router.get("/{session_id}", response_model=SessionInfo, responses=READ)
async def get_session(
    response: Response, service: ServiceDep, tenant: Tenant, session_id: SessionPath
) -> SessionInfo:
    """What a session is and has read."""
    info = await service.get(tenant, session_id)
    tag(response, info)
    return info


@router.patch("/{session_id}", response_model=SessionInfo, responses=failures(404, 409, 415))
async def patch_session(
    response: Response, service: ServiceDep, tenant: Tenant, session_id: SessionPath, body: PatchSession
) -> SessionInfo:
    """Change metadata or expiry; moves no version."""
    info = await service.patch(
        tenant,
        session_id,
        metadata=body.metadata,
        ttl_seconds=body.ttl_seconds,
        clear_expiry=body.clears_expiry,
    )
    name_ignored(response, body)
    tag(response, info)
    return info


@router.delete("/{session_id}", response_model=Receipt, responses=failures(404, 409))
async def delete_session(
    service: ServiceDep, tenant: Tenant, session_id: SessionPath, erase: bool = False
) -> Receipt:
    """Forget a session; ``erase`` takes its forks too. The receipt says what went."""
    return await service.delete(tenant, session_id, erase=erase)


@router.get("/{session_id}/versions", response_model=VersionList, responses=READ)
async def list_versions(service: ServiceDep, tenant: Tenant, session_id: SessionPath) -> VersionList:
    """The versions that can be forked from and rewound to."""
    return VersionList(data=await service.versions(tenant, session_id))


@router.post("/{session_id}/versions", response_model=VersionInfo, status_code=201, responses=CHANGE)
async def name_version(
    request: Request,
    response: Response,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    body: NameVersion,
    if_match: IfMatch,
    key: IdempotencyKey,
) -> VersionInfo:
    """Name the newest version and keep its snapshot."""
    named = await service.name_version(
        tenant,
        session_id,
        name=body.name,
        if_match=if_match,
        idempotency=idempotency(request, key, body_of(body), session_id),
    )
    name_ignored(response, body)
    response.headers["Location"] = f"/v1/sessions/{session_id}/versions/{named.version}"
    return named


@router.delete("/{session_id}/versions/{version}", status_code=204, responses=failures(404, 409))
async def delete_version(service: ServiceDep, tenant: Tenant, session_id: SessionPath, version: int) -> None:
    """Take a version from the list, with its name and snapshot."""
    await service.delete_version(tenant, session_id, version)


@router.post("/{session_id}/fork", response_model=SessionInfo, status_code=201, responses=CHANGE)
async def fork_session(
    request: Request,
    response: Response,
    runtime: RuntimeDep,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    key: IdempotencyKey,
    body: Fork | None = None,
) -> SessionInfo:
    """A new session that begins as a version of this one."""
    body = body or Fork()
    await runtime.limits.admit_session(tenant)
    info = await service.fork(
        tenant,
        session_id,
        version=body.version,
        idempotency=idempotency(request, key, body_of(body), session_id),
    )
    runtime.metrics.forks.inc()
    name_ignored(response, body)
    return _made(response, info)


@router.post("/{session_id}/rewind", response_model=SessionInfo, responses=CHANGE)
async def rewind_session(
    request: Request,
    response: Response,
    runtime: RuntimeDep,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    body: Rewind,
    if_match: IfMatch,
    key: IdempotencyKey,
) -> SessionInfo:
    """Make a new version that equals an older one."""
    info = await service.rewind(
        tenant,
        session_id,
        version=body.version,
        tokens_seen=body.tokens_seen,
        if_match=if_match,
        idempotency=idempotency(request, key, body_of(body), session_id),
    )
    runtime.metrics.rewinds.inc()
    name_ignored(response, body)
    tag(response, info)
    return info


@router.post("/{session_id}/cancel", response_model=Cancelled, responses=failures(404, 409))
async def cancel_session(service: ServiceDep, tenant: Tenant, session_id: SessionPath) -> Cancelled:
    """Stop the running turns and the documents that aren't absorbed."""
    return Cancelled(cancelled=await service.cancel(tenant, session_id))


@router.get("/{session_id}/transcript", response_model=TranscriptList, responses=failures(404, 409))
async def get_transcript(service: ServiceDep, tenant: Tenant, session_id: SessionPath) -> TranscriptList:
    """What was read and said, in order, from the log."""
    entries: list[dict[str, Any]] = await service.transcript(tenant, session_id)
    return TranscriptList(data=entries)


def _made(response: Response, info: SessionInfo) -> SessionInfo:
    tag(response, info)
    response.headers["Location"] = f"/v1/sessions/{info.id}"
    return info
