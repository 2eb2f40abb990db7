"""The asyncio side of an engine, whatever carries the messages. Owns the pending calls and the names of the
handles; knows no socket or process."""

from __future__ import annotations

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

import numpy as np

from mnemosyne.engine import errors
from mnemosyne.engine.errors import EngineError, EngineUnavailable, MnemosyneError
from mnemosyne.engine.messages import (
    INITIAL,
    Advance,
    Advanced,
    Cancel,
    EngineInfo,
    Event,
    Export,
    Exported,
    Failed,
    Finished,
    Generate,
    Load,
    Loaded,
    Progress,
    ReadTrace,
    Release,
    Request,
    Sampling,
    Stats,
    StatsReport,
    Token,
    TokenTrace,
    TraceReport,
    TraceTokens,
)
from mnemosyne.engine.pyramid import Pyramid, Values

log = logging.getLogger(__name__)
Answer = TypeVar("Answer", Advanced, Exported, Loaded, StatsReport, TraceReport, TokenTrace)
Call = Advance | Export | Load | Stats | ReadTrace | TraceTokens


class Calls(ABC):
    """``interface.EngineLike`` but for ``start`` and ``close``, over ``_send`` (out) and ``_receive``
    (in)."""

    def __init__(self) -> None:
        self._info: EngineInfo | None = None
        self._incarnation = 0
        self._ids = itertools.count(1)
        self._pending: dict[str, asyncio.Queue[Event]] = {}
        self._held: set[str] = set()
        """Handles that are bound, or that a running request will bind."""
        self._hooks: list[Callable[[], None]] = []

    @abstractmethod
    def _send(self, request: Request) -> None:
        """Pass ``request`` to the engine without waiting. Raises EngineUnavailable if there is none."""

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineUnavailable("the engine isn't ready")
        return self._info

    @property
    @abstractmethod
    def ready(self) -> bool: ...

    @property
    def incarnation(self) -> int:
        return self._incarnation

    def on_lost(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    def holds(self, handle: str) -> bool:
        return handle == INITIAL or handle in self._held

    async def advance(
        self,
        base: str,
        result: str,
        tokens: tuple[int, ...],
        kinds: bytes | None = None,
        tenant: str = "",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Advanced:
        request = Advance(
            request_id=self._new_id(), tenant=tenant, base=base, result=result, tokens=tokens, kinds=kinds
        )
        return await self._call(request, Advanced, on_progress)

    async def generate(
        self,
        base: str,
        result: str | None,
        prompt: tuple[int, ...],
        sampling: Sampling,
        tenant: str = "",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> AsyncGenerator[Token | Finished, None]:
        request = Generate(
            request_id=self._new_id(),
            tenant=tenant,
            base=base,
            result=result,
            prompt=prompt,
            sampling=sampling,
        )
        async with aclosing(self._events(request, on_progress)) as events:
            async for event in events:
                if isinstance(event, Token | Finished):
                    yield event

    async def export(self, handle: str) -> bytes:
        return (await self._call(Export(request_id=self._new_id(), handle=handle), Exported)).data

    async def load(self, handle: str, data: bytes) -> Loaded:
        return await self._call(Load(request_id=self._new_id(), handle=handle, data=data), Loaded)

    def release(self, handle: str) -> None:
        self._held.discard(handle)
        if self.ready:
            self._send(Release(handle=handle))

    async def stats(self) -> dict[str, float]:
        return (await self._call(Stats(request_id=self._new_id()), StatsReport)).values

    async def device_stats(self) -> dict[str, dict[str, float]]:
        numbers = {"up": float(self.ready), "restarts_total": max(0.0, self._incarnation - 1.0)}
        if self.ready:
            numbers |= await self.stats()
        return {self.info.device: numbers}

    async def trace(self, handle: str) -> Pyramid:
        report = await self._call(ReadTrace(request_id=self._new_id(), handle=handle), TraceReport)
        levels = np.frombuffer(report.data, "<f4").reshape(Pyramid.shape(report.layers))
        return Pyramid.of(report.chunks, levels)

    async def trace_tokens(self, base: str, tokens: tuple[int, ...], tenant: str = "") -> Values:
        request = TraceTokens(request_id=self._new_id(), tenant=tenant, base=base, tokens=tokens)
        report = await self._call(request, TokenTrace)
        return np.frombuffer(report.data, "<f4").reshape(len(tokens), report.layers, 2)

    def _new_id(self) -> str:
        return f"{self._incarnation}.{next(self._ids)}"

    async def _call(
        self,
        request: Call,
        answer: type[Answer],
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Answer:
        async with aclosing(self._events(request, on_progress)) as events:
            async for event in events:
                if isinstance(event, answer):
                    return event
        raise EngineError(f"no {answer.__name__} to a {type(request).__name__}")

    async def _events(
        self,
        request: Call | Generate,
        on_progress: Callable[[Progress], None] | None,
    ) -> AsyncGenerator[Event, None]:
        """Send ``request`` and yield its events but Progress up to the last one; raise what a Failed names.

        Left early, for whatever reason, it cancels the request."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._pending[request.request_id] = queue
        result = _result(request)
        # A handle that is bound already makes the engine refuse the request, and stays bound.
        binds = result is not None and not self.holds(result)
        running = bound = False
        try:
            self._send(request)
            running = True
            if binds and result is not None:
                self._held.add(result)
            while running:
                event = await queue.get()
                running = isinstance(event, Progress | Token)
                if isinstance(event, Failed):
                    raise named(event)
                if not isinstance(event, Progress):
                    bound = not running
                    yield event
                elif on_progress is not None:
                    on_progress(event)
        finally:
            del self._pending[request.request_id]
            if binds and not bound and result is not None:
                self._held.discard(result)
            if running and self.ready:
                self._send(Cancel(request_id=request.request_id))

    def _receive(self, event: Event) -> None:
        """To be called on the event loop with each event. One whose caller has left is dropped."""
        queue = self._pending.get(event.request_id)
        if queue is not None:
            queue.put_nowait(event)

    def _lose(self, message: str) -> None:
        """The engine is gone, and with it every handle: fail what is pending, and tell the hooks."""
        self._held.clear()
        for request_id, queue in self._pending.items():
            queue.put_nowait(Failed(request_id=request_id, error=EngineUnavailable.__name__, message=message))
        for hook in self._hooks:
            try:
                hook()
            except Exception:
                log.exception("a hook for an engine's end failed")


def _result(request: Call | Generate) -> str | None:
    """The handle that ``request`` will bind."""
    match request:
        case Advance() | Generate():
            return request.result
        case Load():
            return request.handle
        case _:
            return None


def named(failed: Failed) -> MnemosyneError:
    """The exception that ``failed`` names."""
    cls = getattr(errors, failed.error, None)
    if not (isinstance(cls, type) and issubclass(cls, MnemosyneError)):
        cls = EngineError
    return cls(failed.message, **failed.attributes)
