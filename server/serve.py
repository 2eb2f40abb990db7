"""Running the server. Owns the socket, the signals and the order of going down; knows no route.

SIGTERM and SIGINT drain: readiness turns 503 and new work is refused while the socket still listens, running
requests end, sessions are saved, then the process ends. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from types import FrameType
from typing import cast

import uvicorn

from mnemosyne.server.app import create_app
from mnemosyne.server.runtime import Runtime
from mnemosyne.server.settings import Settings

LEAVE_SECONDS = 5
"""How long open connections may stay once everything is saved."""


class DrainingServer(uvicorn.Server):
    """uvicorn, which closes its socket on a signal, taught to drain first."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        runtime.on_failed = self._leave

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._draining is not None:
            super().handle_exit(sig, frame)
            return
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._runtime.drain()
        finally:
            self._leave()

    def _leave(self) -> None:
        self.should_exit = True


def serve(settings: Settings) -> None:
    """Serve until a signal. Raises ConfigError; exits with 1 where the engine or the store can't be
    started."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    app = create_app(settings)
    runtime = cast(Runtime, app.state.runtime)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        log_config=None,
        access_log=settings.log_level == "debug",
        timeout_graceful_shutdown=LEAVE_SECONDS,
        server_header=False,
    )
    DrainingServer(config, runtime).run()
    if runtime.failure is not None:
        sys.exit(1)
