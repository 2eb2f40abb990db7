"""``/v1/completions`` and ``/v1/chat/completions``: body to plan, plan to answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response

from mnemosyne.engine.errors import Cancelled
from mnemosyne.server import sse
from mnemosyne.server.answers import ChatWriter, CompletionWriter, Writer
from mnemosyne.server.deps import (
    IdempotencyKey,
    IfMatch,
    RuntimeDep,
    Tenant,
    get_service,
    name_ignored,
    needs_json,
)
from mnemosyne.server.generation import Generation, Plan
from mnemosyne.server.plans import chat_plan, completion_plan
from mnemosyne.server.relay import Relay, Silence
from mnemosyne.server.runtime import Runtime
from mnemosyne.server.schemas.chat import ChatCompletion, ChatRequest
from mnemosyne.server.schemas.common import failures
from mnemosyne.server.schemas.completions import Completion, CompletionRequest
from mnemosyne.server.schemas.generation import GenerationRequest
from mnemosyne.server.sessions.views import Answer

GRACE_SECONDS = 0.1
"""How long a stream's headers wait for an early failure, so that it gets its own status."""
Item = TypeVar("Item")

router = APIRouter(
    prefix="/v1", tags=["completions"], dependencies=[Depends(needs_json), Depends(get_service)]
)
RESPONSES: dict[int | str, dict[str, Any]] = {
    **failures(404, 409, 412, 415, 422),
    200: {
        "content": sse.DESCRIPTION,
        "description": "The answer, or its stream.",
    },
}


@router.post("/completions", response_model=Completion, responses=RESPONSES)
async def create_completion(
    request: Request,
    response: Response,
    body: CompletionRequest,
    runtime: RuntimeDep,
    tenant: Tenant,
    if_match: IfMatch,
    key: IdempotencyKey,
) -> Completion | Response:
    """Continue a prompt."""
    name_ignored(response, body)
    plan = await completion_plan(runtime, tenant, request, body, if_match, key)
    writer = CompletionWriter(plan, runtime.settings.served_model, runtime.tokenizer)
    if body.stream:
        return await _stream(runtime, plan, writer, body, response)
    return writer.whole(await _answers(request, response, runtime, plan, writer))


@router.post("/chat/completions", response_model=ChatCompletion, responses=RESPONSES)
async def create_chat_completion(
    request: Request,
    response: Response,
    body: ChatRequest,
    runtime: RuntimeDep,
    tenant: Tenant,
    if_match: IfMatch,
    key: IdempotencyKey,
) -> ChatCompletion | Response:
    """Answer a conversation, or the next turn of a session's."""
    name_ignored(response, body)
    plan = await chat_plan(runtime, tenant, request, body, if_match, key)
    writer = ChatWriter(plan, runtime.settings.served_model, runtime.tokenizer, runtime.template)
    if body.stream:
        return await _stream(runtime, plan, writer, body, response)
    return writer.whole(await _answers(request, response, runtime, plan, writer))


async def _stream(
    runtime: Runtime, plan: Plan, writer: Writer, body: GenerationRequest, response: Response
) -> sse.EventStream:
    generation = Generation(runtime, plan)
    await generation.open()
    relay = Relay(writer.stream(generation.pieces(), body.usage_in_stream))
    await relay.settle(GRACE_SECONDS)
    headers = dict(response.headers)
    if plan.session_id is not None:
        headers["X-Session-ID"] = plan.session_id
    return sse.EventStream(relay, runtime.settings.sse_ping_interval, headers)


async def _answers(
    request: Request, response: Response, runtime: Runtime, plan: Plan, writer: Writer
) -> list[Answer]:
    generation = Generation(runtime, plan)
    await generation.open()
    answers = await _while_connected(request, Relay(_once(writer, generation)))
    session = answers[0].session
    if session is not None:
        response.headers["ETag"] = f'"{session.version}"'
        response.headers["X-Session-ID"] = session.id
    return answers


async def _once(writer: Writer, generation: Generation) -> AsyncGenerator[list[Answer], None]:
    pieces = generation.pieces()
    try:
        yield await writer.collect(pieces)
    finally:
        await pieces.aclose()


async def _while_connected(request: Request, relay: Relay[Item]) -> Item:
    """The relay's one item; a client that leaves closes the relay."""
    waiting = asyncio.ensure_future(relay.next())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise Cancelled("the client left")
        item = waiting.result()
        assert not isinstance(item, Silence)
        return item
    finally:
        waiting.cancel()
        gone.cancel()
        relay.close()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
