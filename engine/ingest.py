"""The part of a step that commits chunks of input. Owns a batch from the scheduler's choice to each request's
progress; doesn't know what a request does when all of it is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from mnemosyne.engine.commits import Committed
from mnemosyne.engine.counters import Counters
from mnemosyne.engine.desk import Desk
from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.holdings import Holdings
from mnemosyne.engine.jobs import Job
from mnemosyne.engine.messages import Progress, TokenTrace, TraceTokens
from mnemosyne.engine.relief import Relief
from mnemosyne.engine.runner import Runner
from mnemosyne.engine.scheduler import Scheduler
from mnemosyne.engine.state import SessionState


class Ingest:
    def __init__(
        self,
        desk: Desk,
        scheduler: Scheduler,
        runner: Runner,
        holdings: Holdings,
        relief: Relief,
        counters: Counters,
        has_read: Callable[[Job, SessionState], None],
    ) -> None:
        """``has_read`` is told of each request whose whole chunks are committed, with its state then."""
        self._desk, self._scheduler, self._runner = desk, scheduler, runner
        self._holdings, self._relief, self._counters = holdings, relief, counters
        self._has_read = has_read

    def step(self) -> None:
        while self._scheduler.ingesting and not self._ran():
            # At once: the unfinished chunks that were given up for it come back with this step's decode.
            pass

    def _ran(self) -> bool:
        """False where the batch had no room, and there is more now."""
        running = self._desk.running()
        names, chunks = self._scheduler.next_ingest(self._holdings.free(running))
        self._holdings.make_room(len(names), running)
        began = time.perf_counter()
        jobs = [self._desk.jobs[name] for name in names]
        size = chunks * self._runner.chunk
        states = [job.state for job in jobs if job.state is not None]
        ids = [job.whole[job.read : job.read + size] for job in jobs]
        per_token = any(isinstance(job.request, TraceTokens) for job in jobs)
        reason = None
        try:
            outcomes = self._runner.commit(states, ids, per_token)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        if reason is not None:
            smaller = partial(self._scheduler.ingest_too_large, chunks * len(jobs))
            return not self._relief.ran_out(jobs, smaller, reason)
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._scheduler.ingested(job.id, chunks)
            if isinstance(outcome, MnemosyneError):
                self._desk.fail(job, outcome)
                continue
            job.state, job.reserve = outcome.state, 0
            job.read += size
            self._counters.add("tokens_ingested_total", size)
            if isinstance(job.request, TraceTokens):
                self._trace(job, job.request, outcome)
                continue
            self.report(job, outcome)
            if job.read == len(job.whole):
                self._has_read(job, outcome.state)
        seconds = time.perf_counter() - began
        self._counters.add("ingest_seconds_total", seconds)
        self._scheduler.observe(size * len(jobs), seconds)
        return True

    def report(self, job: Job, committed: Committed) -> None:
        """Tell how far the request has come."""
        written = int(np.count_nonzero(committed.trace.column("written")))
        self._counters.add("chunks_written_total", written)
        self._counters.add("chunks_skipped_total", len(committed.trace) - written)
        done = max(0, committed.state.position - job.start)
        self._desk.say(Progress(request_id=job.id, tokens_done=done, trace=committed.trace))

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
