"""Many sessions advanced at once: requests in, events out, one scheduling step at a time. Owns what a step
does; knows no thread, socket or tokenizer. Not safe for more than one thread.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import torch

from mnemosyne.engine.advance import split
from mnemosyne.engine.arrivals import Arrivals
from mnemosyne.engine.chunk_trace import NO_CHUNKS
from mnemosyne.engine.commits import Committed
from mnemosyne.engine.copies import Copier, copier_for
from mnemosyne.engine.counters import Counters
from mnemosyne.engine.desk import Desk
from mnemosyne.engine.draws import Draws, Turn
from mnemosyne.engine.errors import MnemosyneError, RequestError
from mnemosyne.engine.holdings import Holdings, tensor_bytes
from mnemosyne.engine.ids import NO_IDS, joined
from mnemosyne.engine.ingest import Ingest
from mnemosyne.engine.jobs import Job
from mnemosyne.engine.messages import (
    Advance,
    Advanced,
    Cancel,
    EngineInfo,
    Event,
    Export,
    Finished,
    FinishReason,
    Generate,
    ReadTrace,
    Release,
    Request,
    Stats,
    StatsReport,
    Token,
    TraceTokens,
)
from mnemosyne.engine.relief import Relief
from mnemosyne.engine.runner import Decoding, Model, Runner
from mnemosyne.engine.sampling import Choice
from mnemosyne.engine.scheduler import Limits, Scheduler
from mnemosyne.engine.state import GENERATED, SessionState
from mnemosyne.engine.tiers import Budgets
from mnemosyne.engine.transfers import Transfers


class Engine:
    """``accept`` requests, call ``step`` until ``idle``; both give events, each request's in order.

    ``dump`` and ``load`` turn a state into bytes and back (Export and Load); ``load`` checks what it is
    given. ``budgets``: None for a device that has one memory with the host."""

    def __init__(
        self,
        model: Model,
        info: EngineInfo,
        limits: Limits,
        dump: Callable[[SessionState], bytes],
        load: Callable[[bytes], SessionState],
        budgets: Budgets | None = None,
        copier: Copier | None = None,
    ) -> None:
        initial, chunk = model.initial_state(), model.config.chunk
        nbytes = tensor_bytes(initial.tensors)
        copier = copier or copier_for(next(iter(initial.tensors.values())).device)
        self.info = dataclasses.replace(
            info,
            max_queued_tokens=limits.max_queued_tokens,
            room_bytes=None if budgets is None else budgets.device + budgets.host,
        )
        self._draws = Draws()
        self._chunk = chunk
        self._runner = Runner(model)
        self._scheduler = Scheduler(limits, chunk)
        self._counters = Counters()
        self._holdings = Holdings(nbytes, self._counters, budgets, copier)
        self._desk = Desk(initial, self._holdings, self._scheduler, self._counters, model.config.vocab_size)
        self._relief = Relief(self._holdings, self._desk, self._counters)
        self._arrivals = Arrivals(self._holdings, self._desk, self._relief, nbytes, chunk)
        self._transfers = Transfers(self._desk, self._relief, self._counters, dump, load)
        self._ingest = Ingest(
            self._desk,
            self._scheduler,
            self._runner,
            self._holdings,
            self._relief,
            self._counters,
            self._has_read,
        )

    @property
    def idle(self) -> bool:
        """A step would do nothing."""
        return not (self._computes or self._arrivals)

    @property
    def _computes(self) -> bool:
        return not self._scheduler.idle or bool(self._transfers) or self._runner.committing

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

        In this order, so that a prompt that is read to its end has its first token in the same step. A
        session whose chunk is being committed misses its turn. Where there is nothing to compute until a
        state has come, it waits for that."""
        if self.idle:
            return []
        if not self._computes:
            self._holdings.wait()
            self._start_ready()
            return self._desk.events()
        began = time.perf_counter()
        with torch.inference_mode():
            self._transfers.next()
            self._ingest.step()
            self._start_ready()
            self._decode()
            self._start_ready()
        self._counters.add("steps_total")
        self._counters.add("busy_seconds_total", time.perf_counter() - began)
        return self._desk.events()

    def _start_ready(self) -> None:
        self._holdings.poll()
        started = True
        while started or self._desk.unblocked:  # who ends as it starts lets others start
            for job in self._desk.ready():
                if isinstance(job.request, Export | ReadTrace):
                    self._transfers.add(job)  # it reads its state wherever that is
                else:
                    self._arrivals.add(job)
            jobs = self._arrivals.take()
            started = bool(jobs)
            for job in jobs:
                try:
                    self._start(job)
                except MnemosyneError as error:
                    self._desk.fail(job, error)

    def _start(self, job: Job) -> None:
        """The request's base is on the device: put the request where a step finds it."""
        request = job.request
        if not isinstance(request, Advance | Generate | TraceTokens):
            self._transfers.add(job)
            return
        assert job.base is not None and job.base.state is not None
        state, job.base = job.base.state, None
        if isinstance(request, TraceTokens):
            self._start_tracing(job, state)
            return
        if isinstance(request, Advance):
            kinds = request.kinds
        else:
            kinds = None
            if not request.prompt and not state.tokens_seen:
                raise RequestError(
                    "nothing to go on: the prompt is empty and nothing was read", param="prompt"
                )
        job.state, job.start = state, state.tokens_seen
        job.whole, job.rest, job.rest_kinds = split(state, job.tokens, kinds, self._chunk)
        job.tokens = NO_IDS
        if len(job.whole):
            self._scheduler.to_ingest(job.id, len(job.whole) // self._chunk)
        else:
            self._has_read(job, state)

    def _start_tracing(self, job: Job, state: SessionState) -> None:
        """All tokens are committed at once, the last chunk too: nothing will come after it."""
        if (state.tokens_seen + len(job.tokens)) % self._chunk:
            raise RequestError(
                f"values per token come by whole chunks, and {state.tokens_seen} + {len(job.tokens)} tokens"
                " don't end where a chunk does",
                param="tokens",
            )
        job.state, job.whole, job.tokens = state, joined(state.pending, job.tokens), NO_IDS
        self._scheduler.to_ingest(job.id, len(job.whole) // self._chunk)

    def _has_read(self, job: Job, state: SessionState) -> None:
        """All whole chunks are committed: an advance is done, an answer begins."""
        state = dataclasses.replace(state, pending=job.rest, kinds=job.rest_kinds)
        if isinstance(job.request, Generate):
            job.state, job.whole = None, NO_IDS
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
        jobs = self._who_decodes()
        if not jobs and not self._runner.committing:
            return
        began = time.perf_counter()
        rows = [job.decoding for job in jobs if job.decoding is not None]
        reason = None
        try:
            outcomes = self._runner.decode(rows)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        if reason is not None:
            self._relief.ran_out(jobs, partial(self._scheduler.decode_too_large, len(jobs)), reason)
            return
        self._scheduler.decode_fitted()
        turns = [
            Turn(job, row, outcome)
            for job, row, outcome in zip(jobs, rows, outcomes, strict=True)
            if outcome is not None
        ]
        for (job, row, _), choice in zip(turns, self._draws.draw(turns), strict=True):
            self._scheduler.decoded(job.id)
            try:
                if len(row.trace):
                    self._counters.add("tokens_recommitted_total", self._chunk)
                    self._ingest.report(job, Committed(row.state, row.trace))
                    row.trace = NO_CHUNKS
                if isinstance(choice, MnemosyneError):
                    raise choice
                self._emit(job, row, choice)
            except MnemosyneError as error:
                self._desk.fail(job, error)
        self._counters.add("decode_seconds_total", time.perf_counter() - began)

    def _who_decodes(self) -> list[Job]:
        """Of those whose turn it is, the ones whose new states the device has room for: a chunk that is full
        is committed before its session's next token."""
        jobs = [self._desk.jobs[name] for name in self._scheduler.next_decode()]
        full = [job for job in jobs if job.decoding is not None and self._runner.commits_next(job.decoding)]
        full = [job for job in full if job.decoding is not None and not job.decoding.committing]
        if not full:
            return jobs
        running = self._desk.running()
        free = max(1, self._holdings.free(running))
        if len(full) <= free:
            return jobs
        self._holdings.make_room(len(full), running)
        later = set(full[free:])
        return [job for job in jobs if job not in later]

    def _emit(self, job: Job, row: Decoding, choice: Choice) -> None:
        assert isinstance(job.request, Generate)
        sampling = job.request.sampling
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
            if len(whole):
                outcome = self._relief.alone(lambda: self._runner.commit([state], [whole]), job)[0]
                if isinstance(outcome, MnemosyneError):
                    raise outcome
                self._counters.add("tokens_recommitted_total", self._chunk)
                self._ingest.report(job, outcome)
                state = outcome.state
            state = dataclasses.replace(state, pending=rest, kinds=kinds)
        tokens = tuple(job.emitted)
        done = Finished(request_id=job.id, reason=reason, tokens=tokens, tokens_seen=seen)
        self._desk.finish(job, state, done)
