"""What the server says of itself: models, tokenizer, usage, version, metrics."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from mnemosyne.engine.errors import MnemosyneError, RequestError, UnknownModel
from mnemosyne.server.deps import RuntimeDep, Tenant, check_model, get_service, needs_json
from mnemosyne.server.package import package_version
from mnemosyne.server.runtime import Runtime
from mnemosyne.server.schemas.common import failures
from mnemosyne.server.schemas.service import (
    Detokenized,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    TenantUsage,
    TokenizeRequest,
    Tokens,
    VersionReport,
)

ENGINE_SECONDS = 2.0
"""How long the metrics wait for the engine's part: it answers between two steps."""
router = APIRouter(tags=["server"])


@router.get("/v1/models", response_model=ModelList, responses=failures(), dependencies=[Depends(get_service)])
async def list_models(runtime: RuntimeDep) -> ModelList:
    """The model that is served."""
    return ModelList(data=[_card(runtime)])


@router.get(
    "/v1/models/{model:path}",
    response_model=ModelCard,
    responses=failures(404),
    dependencies=[Depends(get_service)],
)
async def get_model(runtime: RuntimeDep, model: str) -> ModelCard:
    """One model."""
    if model != runtime.settings.served_model:
        raise UnknownModel(f"there is no model {model!r} here", param="model")
    return _card(runtime)


@router.post(
    "/tokenize", response_model=Tokens, responses=failures(404, 415), dependencies=[Depends(needs_json)]
)
async def tokenize(runtime: RuntimeDep, body: TokenizeRequest) -> Tokens:
    """A text's token ids, as a prompt has them."""
    check_model(runtime, body.model)
    ids = runtime.tokenizer.encode(body.prompt)
    return Tokens(tokens=list(ids), count=len(ids), max_model_len=runtime.settings.max_request_tokens)


@router.post(
    "/detokenize",
    response_model=Detokenized,
    responses=failures(404, 415),
    dependencies=[Depends(needs_json)],
)
async def detokenize(runtime: RuntimeDep, body: DetokenizeRequest) -> Detokenized:
    """The text that token ids stand for."""
    check_model(runtime, body.model)
    if body.tokens and max(body.tokens) >= runtime.tokenizer.vocab_size:
        raise RequestError(f"token id {max(body.tokens)} isn't in the vocabulary", param="tokens")
    return Detokenized(prompt=runtime.tokenizer.decode(body.tokens))


@router.get("/v1/usage", response_model=TenantUsage, responses=failures())
async def get_usage(runtime: RuntimeDep, tenant: Tenant) -> TenantUsage:
    """What this key's tenant uses, and how much it may."""
    sessions, stored = await runtime.limits.used(tenant)
    return TenantUsage(
        tenant=tenant,
        sessions=sessions,
        max_sessions=runtime.limits.max_sessions,
        stored_bytes=stored,
        max_stored_bytes=runtime.limits.max_bytes,
        tokens=runtime.rate.used(tenant),
        tokens_per_minute=runtime.rate.per_minute,
        tokens_remaining=runtime.rate.remaining(tenant),
    )


@router.get("/version", response_model=VersionReport, responses=failures())
async def get_version() -> VersionReport:
    """The server's version."""
    return VersionReport(version=package_version())


@router.get(
    "/metrics",
    response_class=Response,
    responses={**failures(), 200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}},
)
async def get_metrics(runtime: RuntimeDep) -> Response:
    """Numbers for Prometheus."""
    engines: dict[str, dict[str, float]] = {}
    with suppress(MnemosyneError, TimeoutError):  # an engine that is away must not hide the server's own
        engines = await asyncio.wait_for(runtime.engine.device_stats(), ENGINE_SECONDS)
    runtime.metrics.show(engines, runtime.stats())
    return Response(runtime.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _card(runtime: Runtime) -> ModelCard:
    info: Any = runtime.engine.info
    return ModelCard(
        id=runtime.settings.served_model,
        created=runtime.started_at,
        root=str(runtime.settings.checkpoint),
        max_model_len=runtime.settings.max_request_tokens,
        fingerprint=info.model_fingerprint,
        parameters=info.parameters,
        state_bytes=info.state_bytes,
    )
