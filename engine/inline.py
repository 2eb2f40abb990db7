"""An engine on a thread of this process: the same interface without a process, for tests and local tools."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from mnemosyne.engine.calls import Calls
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import EngineUnavailable
from mnemosyne.engine.loop import Loop
from mnemosyne.engine.messages import Event, Request


class InlineEngine(Calls):
    """Satisfies ``interface.EngineLike``. It can't die alone: its handles are lost when it is closed."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        return self._loop is not None

    async def start(self) -> None:
        events = asyncio.get_running_loop()

        def emit(batch: Sequence[Event]) -> None:
            events.call_soon_threadsafe(self._receive_all, batch)

        def run(loop: Loop) -> None:
            try:
                loop.run()
            finally:
                events.call_soon_threadsafe(self._ended)

        self._loop = Loop(self._engine, emit)
        self._info = self._engine.info
        self._incarnation = 1
        self._thread = threading.Thread(target=run, args=(self._loop,), name="engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        if self._loop is None or self._thread is None:
            return
        self._loop.stop()
        await asyncio.to_thread(self._thread.join)
        self._ended()

    def _ended(self) -> None:
        self._loop = None
        self._lose("the engine was closed")

    def _send(self, request: Request) -> None:
        if self._loop is None:
            raise EngineUnavailable("the engine isn't running")
        self._loop.post(request)

    def _receive_all(self, batch: Sequence[Event]) -> None:
        for event in batch:
            self._receive(event)
