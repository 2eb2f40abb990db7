"""Many sessions advanced at once: requests in, events out, one scheduling step at a time. Owns what a step
does; knows no thread, socket or tokenizer. Not safe for more than one thread.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from mnemosyne.engine.advance import split
from mnemosyne.engine.counters import Counters
from mnemosyne.engine.desk import Desk
from mnemosyne.engine.errors import EngineError, MnemosyneError, RequestError
from mnemosyne.engine.jobs import Job
from mnemosyne.engine.messages import (
    Advance,
    Advanced,
    Cancel,
    EngineInfo,
    Event,
    Exported,
    Finished,
    FinishReason,
    Generate,
    Load,
    Loaded,
    Progress,
    ReadTrace,
    Release,
    Request,
    Stats,
    StatsReport,
    Token,
    TokenTrace,
    TraceReport,
    TraceTokens,
)
from mnemosyne.engine.pyramid import Pyramid
from mnemosyne.engine.runner import Committed, Decoding, Logits, Model, Runner
from mnemosyne.engine.scheduler import Limits, Scheduler
from mnemosyne.engine.state import GENERATED, SessionState


class Engine:
    """``accept`` requests, call ``step`` until ``idle``; both give events, each request's in order.

    ``dump`` and ``load`` turn a state into bytes and back (Export and Load); ``load`` checks what it is
    given."""

    def __init__(
        self,
        model: Model,
        info: EngineInfo,
        limits: Limits,
        dump: Callable[[SessionState], bytes],
        load: Callable[[bytes], SessionState],
    ) -> None:
        self.info = dataclasses.replace(info, max_queued_tokens=limits.max_queued_tokens)
        self._chunk = model.config.chunk
        self._runner = Runner(model)
        self._scheduler = Scheduler(limits, self._chunk)
        self._counters = Counters()
        self._desk = Desk(model.initial_state(), self._scheduler, self._counters, model.config.vocab_size)
        self._transfers: deque[Job] = deque()
        self._dump = dump
        self._load = load

    @property
    def idle(self) -> bool:
        """A step would compute nothing."""
        return self._scheduler.idle and not self._transfers

    def accept(self, request: Request) -> list[Event]:
        """Take a request. A refused one is answered by Failed at once, and changes nothing."""
        match request:
            case Release():
                self._desk.release(request.handle)
            case Cancel():
                self._desk.cancel(request.request_id)
            case Stats():
                values = self._counters.values | self._desk.gauges()
                self._desk.say(StatsReport(request_id=request.request_id, values=values))
            case _:
                self._desk.accept(request)
        self._start_ready()
        return self._desk.events()

    def step(self) -> list[Event]:
        """One transfer, then one batch of ingest, then a token of each session that decodes.

        In this order, so that a prompt that is read to its end has its first token in the same step."""
        if self.idle:
            return []
        began = time.perf_counter()
        with torch.inference_mode():
            if self._transfers:
                self._transfer(self._transfers.popleft())
            self._ingest()
            self._start_ready()
            self._decode()
            self._start_ready()
        self._counters.add("steps_total")
        self._counters.add("busy_seconds_total", time.perf_counter() - began)
        return self._desk.events()

    def _start_ready(self) -> None:
        for job in self._desk.ready():
            try:
                self._start(job)
            except MnemosyneError as error:
                self._desk.fail(job, error)

    def _start(self, job: Job) -> None:
        """The request's base is there: put it where a step finds it."""
        request = job.request
        if not isinstance(request, Advance | Generate | TraceTokens):
            self._transfers.append(job)
            return
        assert job.base is not None and job.base.state is not None
        state, job.base = job.base.state, None
        if isinstance(request, TraceTokens):
            self._start_tracing(job, state, request.tokens)
            return
        if isinstance(request, Advance):
            tokens, kinds = request.tokens, request.kinds
        else:
            tokens, kinds = request.prompt, None
            if not tokens and not state.tokens_seen:
                raise RequestError(
                    "nothing to go on: the prompt is empty and nothing was read", param="prompt"
                )
        job.state, job.start = state, state.tokens_seen
        job.whole, job.rest, job.rest_kinds = split(state, tokens, kinds, self._chunk)
        if job.whole:
            self._scheduler.to_ingest(job.id, len(job.whole) // self._chunk)
        else:
            self._has_read(job, state)

    def _start_tracing(self, job: Job, state: SessionState, tokens: tuple[int, ...]) -> None:
        """All tokens are committed at once, the last chunk too: nothing will come after it."""
        if (state.tokens_seen + len(tokens)) % self._chunk:
            raise RequestError(
                f"values per token come by whole chunks, and {state.tokens_seen} + {len(tokens)} tokens don't"
                " end where a chunk does",
                param="tokens",
            )
        job.state, job.whole = state, state.pending + tokens
        self._scheduler.to_ingest(job.id, len(job.whole) // self._chunk)

    def _ingest(self) -> None:
        names, chunks = self._scheduler.next_ingest()
        if not names:
            return
        began = time.perf_counter()
        size = chunks * self._chunk
        jobs = [self._desk.jobs[name] for name in names]
        states = [job.state for job in jobs if job.state is not None]
        ids = [job.whole[job.read : job.read + size] for job in jobs]
        per_token = any(isinstance(job.request, TraceTokens) for job in jobs)
        outcomes = self._runner.commit(states, ids, per_token)
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._scheduler.ingested(job.id, chunks)
            if isinstance(outcome, MnemosyneError):
                self._desk.fail(job, outcome)
                continue
            job.state = outcome.state
            job.read += size
            self._counters.add("tokens_ingested_total", size)
            if isinstance(job.request, TraceTokens):
                self._trace(job, job.request, outcome)
                continue
            self._report(job, outcome)
            if job.read == len(job.whole):
                self._has_read(job, outcome.state)
        seconds = time.perf_counter() - began
        self._counters.add("ingest_seconds_total", seconds)
        self._scheduler.observe(size * len(jobs), seconds)

    def _trace(self, job: Job, request: TraceTokens, committed: Committed) -> None:
        assert committed.tokens is not None
        job.traced.append(committed.tokens)
        if job.read < len(job.whole):
            return
        # What was pending in the base comes before the tokens that were asked for.
        values = np.concatenate(job.traced)[-len(request.tokens) :]
        data = values.astype("<f4").tobytes()
        done = TokenTrace(request_id=job.id, layers=values.shape[1], data=data)
        self._desk.finish(job, committed.state, done)

    def _report(self, job: Job, committed: Committed) -> None:
        for chunk in committed.trace:
            self._counters.add("chunks_written_total" if chunk.written > 0 else "chunks_skipped_total")
        done = max(0, committed.state.position - job.start)
        self._desk.say(Progress(request_id=job.id, tokens_done=done, trace=committed.trace))

    def _has_read(self, job: Job, state: SessionState) -> None:
        """All whole chunks are committed: an advance is done, an answer begins."""
        state = dataclasses.replace(state, pending=job.rest, kinds=job.rest_kinds)
        if isinstance(job.request, Generate):
            job.state, job.whole = None, ()
            job.decoding = Decoding(state)
            if job.request.sampling.max_tokens:
                self._scheduler.to_decode(job.id)
            else:
                self._end_answer(job, job.decoding, "length")
            return
        seen = state.tokens_seen
        done = Advanced(request_id=job.id, position=state.position, tokens_seen=seen)
        self._desk.finish(job, state, done)

    def _decode(self) -> None:
        jobs = [self._desk.jobs[name] for name in self._scheduler.next_decode()]
        if not jobs:
            return
        began = time.perf_counter()
        rows = [job.decoding for job in jobs if job.decoding is not None]
        for job, row, outcome in zip(jobs, rows, self._runner.decode(rows), strict=True):
            self._scheduler.decoded(job.id)
            try:
                if row.trace:
                    self._counters.add("tokens_recommitted_total", self._chunk)
                    self._report(job, Committed(row.state, tuple(row.trace)))
                if isinstance(outcome, MnemosyneError):
                    raise outcome
                self._emit(job, row, outcome)
            except MnemosyneError as error:
                self._desk.fail(job, error)
        self._counters.add("decode_seconds_total", time.perf_counter() - began)

    def _emit(self, job: Job, row: Decoding, logits: Logits) -> None:
        assert isinstance(job.request, Generate) and job.sampler is not None
        sampling = job.request.sampling
        choice = job.sampler.draw(logits, row.state.tokens_seen)
        if choice.token in sampling.stop_ids and not sampling.ignore_eos:
            self._end_answer(job, row, "stop")
            return
        self._counters.add("tokens_generated_total")
        self._desk.say(
            Token(
                request_id=job.id,
                index=len(job.emitted),
                token=choice.token,
                logprob=choice.logprob,
                top_logprobs=choice.top,
            )
        )
        job.emitted.append(choice.token)
        row.next = choice.token
        if len(job.emitted) == sampling.max_tokens:
            self._end_answer(job, row, "length")

    def _end_answer(self, job: Job, row: Decoding, reason: FinishReason) -> None:
        """The last token is part of the result too; it may be the one that has a chunk committed."""
        state = row.state
        seen = state.tokens_seen + (row.next is not None)
        if row.next is not None and job.result is not None:
            whole, rest, kinds = split(state, (row.next,), bytes([GENERATED]), self._chunk)
            if whole:
                outcome = self._runner.commit([state], [whole])[0]
                if isinstance(outcome, MnemosyneError):
                    raise outcome
                self._counters.add("tokens_recommitted_total", self._chunk)
                self._report(job, outcome)
                state = outcome.state
            state = dataclasses.replace(state, pending=rest, kinds=kinds)
        tokens = tuple(job.emitted)
        done = Finished(request_id=job.id, reason=reason, tokens=tokens, tokens_seen=seen)
        self._desk.finish(job, state, done)

    def _transfer(self, job: Job) -> None:
        if job.id not in self._desk.jobs:
            return
        began = time.perf_counter()
        try:
            if isinstance(job.request, Load):
                state = self._load(job.request.data)
                seen = state.tokens_seen
                loaded = Loaded(request_id=job.id, position=state.position, tokens_seen=seen)
                self._desk.finish(job, state, loaded)
            else:
                assert job.base is not None and job.base.state is not None
                state = job.base.state
                if isinstance(job.request, ReadTrace):
                    self._desk.finish(job, state, _told(job.id, state.pyramid))
                else:
                    self._desk.finish(job, state, Exported(request_id=job.id, data=self._dump(state)))
        except MnemosyneError as error:
            self._desk.fail(job, error)
        except Exception as error:
            self._desk.fail(
                job, EngineError(f"a state couldn't be transferred: {type(error).__name__}: {error}")
            )
        self._counters.add("transfer_seconds_total", time.perf_counter() - began)


def _told(request_id: str, pyramid: Pyramid) -> TraceReport:
    levels = pyramid.array()
    data = levels.astype("<f4").tobytes()
    return TraceReport(request_id=request_id, chunks=pyramid.chunks, layers=levels.shape[2], data=data)
