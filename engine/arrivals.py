"""Requests on their way to the device: those that wait for room there, and those whose state is being copied.
Owns their order; the first that waits is the first to go. Knows no model."""

from __future__ import annotations

from collections import deque

from mnemosyne.engine.desk import Desk
from mnemosyne.engine.errors import DeviceFull
from mnemosyne.engine.holdings import Held, Holdings
from mnemosyne.engine.jobs import Job
from mnemosyne.engine.messages import Advance, Generate, Load, TraceTokens
from mnemosyne.engine.relief import Relief
from mnemosyne.engine.tiers import Tier


class Arrivals:
    def __init__(self, holdings: Holdings, desk: Desk, relief: Relief, nbytes: int, chunk: int) -> None:
        """``nbytes``: what the tensors of any state take."""
        self._holdings, self._desk, self._relief = holdings, desk, relief
        self._nbytes, self._chunk = nbytes, chunk
        self._waiting: deque[Job] = deque()
        self._coming: list[Job] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._coming)

    def add(self, job: Job) -> None:
        """Its base, where it has one, is known."""
        self._waiting.append(job)

    def take(self) -> list[Job]:
        """Those that may begin now. To be called after ``Holdings.poll``."""
        here = [job for job in self._coming if self._there(job) and _held(job).tier is Tier.DEVICE]
        self._coming = [job for job in self._coming if self._there(job) and job not in here]
        while self._waiting:
            job = self._waiting[0]
            if self._there(job):
                try:
                    if not self._admit(job):
                        break
                except DeviceFull as error:
                    self._waiting.popleft()
                    self._desk.fail(job, error)
                    continue
                (here if job.base is None or _held(job).tier is Tier.DEVICE else self._coming).append(job)
            self._waiting.popleft()
        return here

    def _there(self, job: Job) -> bool:
        return job.id in self._desk.jobs

    def _admit(self, job: Job) -> bool:
        """Whether it has its place now; while others may yet make room for it, it waits. Raises
        DeviceFull."""
        held = None if job.base is None else _held(job)
        own = self._makes_a_state(job)
        needed = own + (held is not None and held.tier is Tier.HOST)
        running = self._desk.running()
        if needed and not self._holdings.fits(needed, running):
            self._holdings.make_room(needed, running, keep=held)
            if self._holdings.copying or running:
                return False
        job.admitted, job.reserve = True, own * self._nbytes
        if held is not None:
            try:
                self._relief.alone(lambda: self._holdings.fetch(held), job)
            except DeviceFull:
                job.admitted = False
                if running:
                    return False
                raise
        return True

    def _makes_a_state(self, job: Job) -> bool:
        """Whether it will commit whole chunks before anything else."""
        match job.request:
            case Load():
                return True
            case Advance() | TraceTokens():
                tokens = len(job.request.tokens)
            case Generate():
                tokens = len(job.request.prompt)
            case _:
                return False
        state = None if job.base is None else job.base.state
        return state is not None and len(state.pending) + tokens > self._chunk


def _held(job: Job) -> Held:
    assert job.base is not None and job.base.held is not None
    return job.base.held
