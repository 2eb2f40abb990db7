"""A session's state as a file, what reading did to it, and its events as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from mnemosyne.engine.errors import RequestError
from mnemosyne.server import sse
from mnemosyne.server.deps import IfMatch, RuntimeDep, ServiceDep, SessionPath, Tenant, tag
from mnemosyne.server.relay import Relay
from mnemosyne.server.schemas.common import failures
from mnemosyne.server.schemas.surprise import SurpriseAnswer
from mnemosyne.server.sessions.service import SessionService
from mnemosyne.server.sessions.surprise import MAX_TEXT_TOKENS
from mnemosyne.server.sessions.views import SessionInfo

STATE_TYPE = "application/octet-stream"
router = APIRouter(prefix="/v1/sessions/{session_id}", tags=["state"])


@router.get(
    "/state",
    response_class=Response,
    responses={
        **failures(404, 409, 422),
        200: {
            "content": {
                STATE_TYPE: {"schema": {"type": "string", "format": "binary"}},
                "application/zip": {},
            },
            "description": "The state as one safetensors file; with log, a zip with the input log beside it.",
        },
    },
)
async def export_state(
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    version: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
    log: bool = False,
) -> Response:
    """What a session has become, as a file that another server with the same model takes."""
    data = await service.export_state(tenant, session_id, version=version, log=log)
    name = f"{session_id}.zip" if log else f"{session_id}.safetensors"
    return Response(
        data,
        media_type="application/zip" if log else STATE_TYPE,
        headers={"Content-Disposition": f'attachment; filename="{name}"', "X-Session-ID": session_id},
    )


@router.put(
    "/state",
    response_model=SessionInfo,
    responses=failures(404, 409, 412, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {STATE_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def import_state(
    request: Request,
    response: Response,
    runtime: RuntimeDep,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    if_match: IfMatch,
) -> SessionInfo:
    """Make an exported state this session's newest version. The model's fingerprint must be the same."""
    data = await request.body()
    if not data:
        raise RequestError("the body must be a state, as GET gives it")
    await runtime.limits.admit_bytes(tenant, len(data))
    info = await service.import_state(tenant, session_id, data, if_match=if_match)
    tag(response, info)
    return info


@router.get(
    "/surprise",
    response_model=SurpriseAnswer,
    response_model_exclude_unset=True,
    responses=failures(404, 409, 422),
)
async def read_surprise(
    runtime: RuntimeDep,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    start: Annotated[int, Query(alias="from", ge=0, lt=2**63, description="First token.")] = 0,
    to: Annotated[
        int | None, Query(ge=0, lt=2**63, description="Before this token; all if not given.")
    ] = None,
    resolution: Annotated[
        int | None,
        Query(
            ge=1,
            lt=2**63,
            description="Tokens a point: a chunk times a power of two, rounded down; below a chunk the values"
            " are computed again from the input. If not given, so that about 512 points cover the range.",
        ),
    ] = None,
    version: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
    layers: Annotated[bool, Query(description="With the values of every layer.")] = False,
    text: Annotated[
        bool,
        Query(
            description="With each point's text, from the input;"
            f" of at most {MAX_TEXT_TOKENS:,} tokens together."
        ),
    ] = False,
) -> SurpriseAnswer:
    """Where the text surprised the memory, and how far it moved for it: at most a few thousand points."""
    runtime.rate.admit(tenant)
    trace = await service.surprise(
        tenant, session_id, first=start, last=to, resolution=resolution, version=version, text=text
    )
    runtime.rate.charge(tenant, trace.computed)
    return SurpriseAnswer.of(session_id, trace, layers)


@router.get(
    "/events",
    response_class=Response,
    responses={
        **failures(404),
        200: {
            "content": sse.DESCRIPTION,
            "description": "Events, without end.",
        },
    },
)
async def stream_events(
    runtime: RuntimeDep,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    last_event_id: Annotated[int | None, Header(ge=0, lt=2**63)] = None,
    after: Annotated[int | None, Query(ge=0, lt=2**63, description="Like Last-Event-ID.")] = None,
) -> Response:
    """Progress, surprise, versions, tiers and errors as they happen."""
    await service.get(tenant, session_id)
    since = last_event_id if last_event_id is not None else after
    relay = Relay(_events(service, tenant, session_id, since))
    return sse.EventStream(relay, runtime.settings.sse_ping_interval)


async def _events(
    service: SessionService, tenant: str, session_id: str, since: int | None
) -> AsyncGenerator[bytes, None]:
    async for item in service.events(tenant, session_id, last_event_id=since):
        yield sse.event(item.kind, {"at": item.at, **item.data}, item.id)
