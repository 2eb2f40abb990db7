"""The ASGI application, put together. Assembly only: every part is made and explained elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.interface import EngineLike
from mnemosyne.server import errors, openapi, parts
from mnemosyne.server.deps import bearer
from mnemosyne.server.middleware import Authentication, BodyLimit, RequestIdentity
from mnemosyne.server.package import package_version
from mnemosyne.server.routes import completions, documents, health, service, sessions, state
from mnemosyne.server.runtime import Runtime
from mnemosyne.server.settings import Settings

KEYED = (completions, sessions, documents, state, service)


def create_app(
    settings: Settings, *, engine: EngineLike | None = None, store: SessionStore | None = None
) -> FastAPI:
    """The application; ``engine`` and ``store`` are what the settings say unless given.

    It listens while the model loads: readiness says when it is ready. Raises ConfigError or StoreUnavailable.
    """
    runtime = Runtime(settings, engine or parts.make_engine(settings), store or parts.make_store(settings))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runtime.start_soon()
        yield
        await runtime.stop()

    app = FastAPI(
        title="Mnemosyne",
        summary="Titans models whose sessions learn while they read.",
        version=package_version(),
        lifespan=lifespan,
        generate_unique_id_function=openapi.operation_id,
        redirect_slashes=False,
    )
    app.state.runtime = runtime
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    described = [Depends(bearer)] if settings.keys_file is not None else []
    for module in KEYED:
        app.include_router(module.router, dependencies=described)
    app.include_router(health.router)
    errors.install(app)
    app.add_middleware(
        BodyLimit, request_bytes=settings.max_request_bytes, upload_bytes=settings.max_upload_bytes
    )
    app.add_middleware(Authentication, keys=runtime.keys)
    app.add_middleware(RequestIdentity)
    return app
