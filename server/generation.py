"""Completions from plan to pieces. Owns running a request's turns together, and measuring them; knows no
JSON.

A request has one turn for each choice. They are opened a few at a time, so that a batch doesn't fill the
queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from mnemosyne.engine.errors import Cancelled
from mnemosyne.server.runtime import Runtime
from mnemosyne.server.sessions.turnstream import TurnStream
from mnemosyne.server.sessions.views import Answer, Delta, TurnRequest

Piece = tuple[int, Delta | Answer]
"""A choice's index and what came for it."""
TOGETHER = 16
"""Turns of one request that run at a time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request, parsed: a turn for each choice of each prompt, in the order of their indices."""

    tenant: str
    turns: tuple[TurnRequest, ...]
    session_id: str | None
    choices: int = 1
    """Choices of one prompt, whose tokens count once."""
    cached_tokens: int = 0
    """Tokens of a resent history, which the session has read before."""

    @property
    def prompt_tokens(self) -> int:
        return self.cached_tokens + sum(len(turn.prompt) for turn in self.turns[:: self.choices])


class Generation:
    """One running request. ``open`` it, then read ``pieces`` once."""

    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self._runtime, self._plan = runtime, plan
        self._arrived = time.perf_counter()
        self._service = runtime.service  # a request that was admitted ends, also while the server drains
        self._first: TurnStream | None = None

    async def open(self) -> None:
        """Begin the first turn: what can be refused is refused here."""
        self._runtime.rate.admit(self._plan.tenant)
        self._first = await self._begin(self._plan.turns[0])

    async def _begin(self, turn: TurnRequest) -> TurnStream:
        if self._plan.session_id is None:
            return await self._service.complete(self._plan.tenant, turn)
        return await self._service.turn(self._plan.tenant, self._plan.session_id, turn)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What comes, of all choices as it comes; each ends with its Answer. Closing it cancels what can
        be."""
        metrics, plan = self._runtime.metrics, self._plan
        waiting, emitted, outcome = True, 0, "abort"
        last: dict[int, float] = {}
        metrics.request_max_tokens.observe(plan.turns[0].sampling.max_tokens)
        metrics.waiting.inc()
        self._runtime.in_flight += 1
        merged = self._merged()
        try:
            async for index, item in merged:
                now = time.perf_counter()
                if isinstance(item, Delta):
                    emitted += len(item.tokens)
                    if waiting and item.tokens:
                        waiting = False
                        metrics.waiting.dec()
                        metrics.running.inc()
                        metrics.time_to_first_token.observe(now - self._arrived)
                    if item.tokens:
                        if index in last:
                            metrics.inter_token_latency.observe((now - last[index]) / len(item.tokens))
                        last[index] = now
                else:
                    metrics.finished(item.finish_reason)
                    metrics.request_generation_tokens.observe(item.completion_tokens)
                yield index, item
            outcome = "done"
        except Cancelled:
            raise
        except Exception:
            outcome = "error"
            raise
        finally:
            await merged.aclose()
            (metrics.waiting if waiting else metrics.running).dec()
            self._runtime.in_flight -= 1
            self._account(outcome, emitted)

    def _account(self, outcome: str, emitted: int) -> None:
        metrics, plan = self._runtime.metrics, self._plan
        if outcome != "done":
            metrics.finished(outcome)
        learned = plan.prompt_tokens - plan.cached_tokens
        metrics.e2e_latency.observe(time.perf_counter() - self._arrived)
        metrics.request_prompt_tokens.observe(plan.prompt_tokens)
        metrics.prompt_tokens.inc(learned)
        metrics.generation_tokens.inc(emitted)
        self._runtime.rate.charge(plan.tenant, learned + emitted)

    async def _merged(self) -> AsyncGenerator[Piece, None]:
        queue: asyncio.Queue[tuple[int, Delta | Answer | Exception]] = asyncio.Queue()
        room = asyncio.Semaphore(TOGETHER)

        async def read(index: int, turn: TurnRequest) -> None:
            try:
                async with room:
                    stream = self._first if index == 0 and self._first else await self._begin(turn)
                    try:
                        async for item in stream:
                            queue.put_nowait((index, item))
                    finally:
                        await stream.aclose()
            except Exception as error:
                queue.put_nowait((index, error))

        tasks = [asyncio.create_task(read(index, turn)) for index, turn in enumerate(self._plan.turns)]
        try:
            left = len(tasks)
            while left:
                index, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                left -= isinstance(item, Answer)
                yield index, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            if self._first is not None:  # its task may have been cancelled before it began
                await self._first.aclose()
