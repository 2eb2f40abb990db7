"""What probes ask. Live: the process answers. Ready: the model is loaded, the store is there, and it isn't
draining."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.server.deps import RuntimeDep
from mnemosyne.server.schemas.service import Health

router = APIRouter(tags=["health"])
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "Not ready."}}


@router.get("/health/live", response_model=Health)
async def live() -> Health:
    """Whether the process answers; asks nothing else of it."""
    return Health(status="ok")


@router.get("/health", response_model=Health, responses=NOT_READY)
async def health(response: Response, runtime: RuntimeDep) -> Health:
    """The same as ``/health/ready``, under the name that clients know."""
    return await ready(response, runtime)


@router.get("/health/ready", response_model=Health, responses=NOT_READY)
async def ready(response: Response, runtime: RuntimeDep) -> Health:
    """Whether requests can be served now."""
    found = await _state(runtime)
    if found.status != "ok":
        response.status_code = 503
        response.headers["Retry-After"] = "1"
    return found


async def _state(runtime: RuntimeDep) -> Health:
    if runtime.phase == "loading":
        return Health(status="loading")
    if runtime.phase == "draining":
        return Health(status="shutting_down")
    if runtime.phase == "failed":
        return Health(status="failed", detail=runtime.failure.message if runtime.failure else None)
    try:
        await runtime.service.check()
    except MnemosyneError as error:
        return Health(status="unavailable", detail=error.message)
    return Health(status="ok")
