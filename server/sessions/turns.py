"""Turns: a prompt and its answer, learned together or not at all. Knows no HTTP and no chat template.

A turn that learns runs on the newest version's state and commits once, after its last token: until then
nothing of it is anywhere but in a handle of the engine. A turn that doesn't learn runs on a version's state
and keeps nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from mnemosyne.engine.errors import (
    Cancelled,
    CapacityError,
    IdempotencyRunning,
    NotFinite,
    RequestError,
)
from mnemosyne.engine.messages import INITIAL, FinishReason, Token
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.answers import answered, given_before, usage
from mnemosyne.server.sessions.answertext import AnswerText
from mnemosyne.server.sessions.core import Core, check_match
from mnemosyne.server.sessions.failures import told
from mnemosyne.server.sessions.idempotency import first_answer, reply, same_body, scope
from mnemosyne.server.sessions.leases import Held
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.records import Point
from mnemosyne.server.sessions.states import Pinned
from mnemosyne.server.sessions.tokenrun import GENERATED, INPUT, TokenRun
from mnemosyne.server.sessions.trace import Trace
from mnemosyne.server.sessions.turnstream import TurnStream, given_again
from mnemosyne.server.sessions.views import Answer, TurnRequest, to_json

__all__ = ["TurnStream", "Turns"]

log = logging.getLogger(__name__)


class _Run:
    """One running turn."""

    def __init__(self, request: TurnRequest) -> None:
        self.request = request
        self.stream = TurnStream()
        self.committing = False
        """From here on it can't be cancelled any more."""
        self.started = False
        self.task: asyncio.Task[None] | None = None

    def may_leave(self) -> bool:
        return self.request.idempotency is None and not self.committing


class Turns:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._keys: dict[str, str] = {}
        """Idempotency keys of turns that run now, and the hashes of their bodies."""
        self._runs: dict[_Run, Live | None] = {}

    @property
    def running(self) -> int:
        return len(self._runs)

    async def begin(self, live: Live, request: TurnRequest) -> TurnStream:
        """Admit a turn of a session and start it; see ``SessionService.turn``."""
        self._core.admit()
        self._core.check_weights(live.session)
        if not request.learn:
            return self._begin_reading(live, request)
        if request.version is not None:
            raise RequestError("version goes with learn: false: a turn learns on the newest", param="version")
        tenant, asked = live.session.created.tenant, request.idempotency
        if asked is None:
            return await self._begin_learning(live, request)
        key = scope(tenant, asked)
        if (payload := await first_answer(live, tenant, asked)) is not None:
            return given_again(given_before(payload))
        if key in self._keys:
            same_body(self._keys[key], asked)
            raise IdempotencyRunning(
                "the first request under this Idempotency-Key still runs", retry_after=1.0
            )
        self._keys[key] = asked.body_hash
        try:
            return await self._begin_learning(live, request, lambda: self._keys.pop(key, None))
        except BaseException:
            self._keys.pop(key, None)
            raise

    async def begin_stateless(self, tenant: str, request: TurnRequest) -> TurnStream:
        """A completion on the state of a session that has read nothing."""
        self._core.admit()
        run = _Run(replace(request, learn=False, idempotency=None))
        return self._start(run, None, self._complete(run, tenant))

    async def cancel(self, live: Live) -> int:
        """Stop the session's turns, but those that are being committed."""
        tasks = [r.task for r, of in self._runs.items() if of is live and r.task and not r.committing]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        return len(tasks)

    async def settle(self, seconds: float) -> None:
        """Return when no turn runs; those that still do after ``seconds`` are cancelled without a trace."""
        deadline = time.monotonic() + seconds
        while tasks := {run.task for run in self._runs if run.task is not None}:
            _, left = await asyncio.wait(tasks, timeout=max(0.0, deadline - time.monotonic()))
            for run in self._runs:
                if run.task in left and not run.committing:
                    run.task.cancel()
            await asyncio.wait(tasks)

    def _begin_reading(self, live: Live, request: TurnRequest) -> TurnStream:
        check_match(live, request.if_match)
        session = live.session
        home = session.newest_commit if request.version is None else session.point(request.version)
        number = session.newest.number if request.version is None else request.version
        run = _Run(replace(request, idempotency=None))
        return self._start(run, live, self._read(run, live, home, number))

    async def _begin_learning(
        self, live: Live, request: TurnRequest, ended: Callable[[], Any] | None = None
    ) -> TurnStream:
        tenant = live.session.created.tenant
        stack = AsyncExitStack()
        try:
            held = await stack.enter_async_context(self._core.moving(live, request.if_match))
            payload = await first_answer(live, tenant, request.idempotency)  # another server's, a moment ago
        except BaseException:
            await stack.aclose()
            raise
        if ended is not None:
            stack.callback(ended)
        if payload is not None:
            await stack.aclose()
            return given_again(given_before(payload))
        run = _Run(request)
        return self._start(run, live, self._learn(run, live, held, stack), stack)

    def _start(
        self,
        run: _Run,
        live: Live | None,
        work: Coroutine[Any, Any, Answer],
        stack: AsyncExitStack | None = None,
    ) -> TurnStream:
        self._runs[run] = live
        run.task = asyncio.create_task(self._finish(run, live, work), name="turn")
        if live is not None:
            live.tasks.add(run.task)
            run.task.add_done_callback(live.tasks.discard)
        run.task.add_done_callback(lambda _: self._never_began(run, work, stack))
        run.stream.runs_in(run.task, run.may_leave)
        return run.stream

    def _never_began(
        self, run: _Run, work: Coroutine[Any, Any, Answer], stack: AsyncExitStack | None
    ) -> None:
        """A task that is cancelled before its first step runs nothing, not even what would let go of the
        session."""
        if run.started:
            return
        work.close()
        self._core.spawn(self._finish(run, None, _cancelled(stack)), "letting go of a turn")

    async def _finish(self, run: _Run, live: Live | None, work: Coroutine[Any, Any, Answer]) -> None:
        run.started = True
        try:
            run.stream.put(await work)
        except asyncio.CancelledError:
            run.stream.put(Cancelled("the request was cancelled"))
        except Exception as error:
            if live is not None and isinstance(error, NotFinite):
                live.trouble = "not_finite"
                live.events.add("error", told(error))
            if isinstance(error, CapacityError):
                self._core.spawn(self._core.make_room(), "making room")
            run.stream.put(error)
        finally:
            del self._runs[run]
            run.stream.let_go.set()

    async def _complete(self, run: _Run, tenant: str) -> Answer:
        text, reason, emitted = await self._generate(run, INITIAL, None, tenant)
        return answered(run.request, text, reason, emitted, None)

    async def _read(self, run: _Run, live: Live, home: Point, number: int) -> Answer:
        async with self._core.states.use(live, home) as pinned:
            tenant = live.session.created.tenant
            text, reason, emitted = await self._generate(run, pinned.handle, None, tenant)
        await self._core.make_room()
        used = usage(live.id, number, home.tokens, home.tokens, pinned.recomputed_tokens)
        return answered(run.request, text, reason, emitted, used)

    async def _learn(self, run: _Run, live: Live, held: Held, stack: AsyncExitStack) -> Answer:
        async with stack:
            tenant, trace = live.session.created.tenant, Trace()
            async with self._core.states.use(live, live.session.point()) as pinned:
                result = self._core.states.new_handle()
                try:
                    text, reason, emitted = await self._generate(run, pinned.handle, result, tenant, trace)
                    final, ids, runs = await self._close(run.request, pinned, result, text, tenant, trace)
                finally:
                    self._core.engine.release(result)
                tokens = TokenRun.pack(ids, runs, live.session.created.retain_input)
                answer = answered(run.request, text, reason, emitted, None)
                try:
                    answer = await self._commit(run, live, held, pinned, final, tokens, answer)
                except BaseException:
                    self._core.engine.release(final)
                    raise
            live.has_read(trace)
        await self._core.make_room()
        return answer

    async def _generate(
        self, run: _Run, base: str, result: str | None, tenant: str, trace: Trace | None = None
    ) -> tuple[AnswerText, FinishReason, int]:
        """(text, why it ended, tokens emitted); what may be shown goes to the stream as it comes."""
        request = run.request
        text = AnswerText(self._core.tokenizer, request.stop)
        reason: FinishReason = "length"
        emitted = 0
        generation = self._core.engine.generate(
            base, result, request.prompt, request.sampling, tenant, trace.add if trace else None
        )
        try:
            async for event in generation:
                if not isinstance(event, Token):
                    reason = event.reason
                    continue
                emitted += 1
                delta = text.push(event)
                if delta.text or delta.tokens:
                    run.stream.put(delta)
                if text.stopped_at is not None:
                    reason = "stop"
                    break
        finally:
            await generation.aclose()
        delta = text.finish()
        if delta.text or delta.tokens:
            run.stream.put(delta)
        return text, reason, emitted

    async def _close(
        self, request: TurnRequest, pinned: Pinned, result: str, text: AnswerText, tenant: str, trace: Trace
    ) -> tuple[str, tuple[int, ...], list[tuple[int, int]]]:
        """(handle, ids, runs of kinds) of the whole turn: without what came after a stop string, with its
        end."""
        kept, end = text.kept(), request.end_of_turn
        ids = request.prompt + kept + end
        runs = [(INPUT, len(request.prompt)), (GENERATED, len(kept)), (INPUT, len(end))]
        final = self._core.states.new_handle()
        try:
            if text.stopped_at is None:
                await self._core.engine.advance(result, final, end, None, tenant, trace.add)
            else:
                kinds = b"".join(bytes((kind,)) * count for kind, count in runs)
                await self._core.engine.advance(pinned.handle, final, ids, kinds, tenant, trace.add)
        except BaseException:
            self._core.engine.release(final)
            raise
        return final, ids, runs

    async def _commit(
        self,
        run: _Run,
        live: Live,
        held: Held,
        pinned: Pinned,
        final: str,
        tokens: TokenRun,
        answer: Answer,
    ) -> Answer:
        """Make the turn last; from here on it isn't cancelled."""
        session = live.session
        snapshot = None if session.created.retain_input else await self._core.engine.export(final)
        number, base = session.newest.number + 1, session.newest.tokens
        used = usage(live.id, number, base + tokens.count, base, pinned.recomputed_tokens)
        answer = replace(answer, session=used)
        kept = reply(session.created.tenant, run.request.idempotency, to_json(answer))
        record = records.Turn(at=time.time(), version=number, tokens=tokens, reply=kept)
        fence = held.fence
        run.committing = True
        await live.append([record], fence, snapshot)
        await self._core.states.move(
            live, pinned.resident, session.point(), final, saved=snapshot is not None
        )
        if live.trouble == "not_finite":
            live.trouble = None
        self._core.told(live, session.newest)
        return answer


async def _cancelled(stack: AsyncExitStack | None) -> Answer:
    if stack is not None:
        await stack.aclose()
    raise Cancelled("the request was cancelled")
