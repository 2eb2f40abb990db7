"""What is given up when the device's memory ran out: idle states go to the host, and then what can be
computed again. Owns the order; decides nothing of what a step holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch

from mnemosyne.engine.counters import Counters
from mnemosyne.engine.desk import Desk
from mnemosyne.engine.errors import DeviceFull
from mnemosyne.engine.holdings import Holdings
from mnemosyne.engine.jobs import Job

log = logging.getLogger(__name__)
Result = TypeVar("Result")
RETRY_SECONDS = 5


class Relief:
    def __init__(self, holdings: Holdings, desk: Desk, counters: Counters) -> None:
        self._holdings, self._desk, self._counters = holdings, desk, counters

    def give(self, batch: Collection[Job] = ()) -> bool:
        """Free device memory after a step of ``batch`` ran out of it; False where nothing is left to give
        up.

        To be called when the exception is gone: it holds on to what the step had made."""
        self._counters.add("out_of_memory_total")
        left = self._holdings.clear_device(self._desk.running())
        if left:
            log.warning("the device ran out of memory; %d idle states went to the host", left)
            return True
        open_chunks = [
            job.decoding
            for job in self._desk.jobs.values()
            if job not in batch and job.decoding is not None and job.decoding.open is not None
        ]
        for decoding in open_chunks:
            decoding.open = None
        if open_chunks:
            log.warning(
                "the device ran out of memory; %d unfinished chunks will be computed again", len(open_chunks)
            )
        return bool(open_chunks)

    def ran_out(self, jobs: Sequence[Job], smaller: Callable[[], bool], reason: str) -> bool:
        """A step of ``jobs`` ran out of the device's memory, and nothing of it counts: the next one has more
        room, which is what is returned, or is ``smaller``. What doesn't fit alone fails."""
        if self.give(jobs):
            return True
        if smaller():
            log.warning("the device ran out of memory; the next steps are smaller: %s", reason)
            return False
        for job in jobs:
            self._desk.fail(job, _device_full(reason))
        return False

    def alone(self, run: Callable[[], Result], *batch: Job) -> Result:
        """``run``, for one session, again for as long as something can be given up. Raises DeviceFull."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                reason = str(error)
            if not self.give(batch):
                raise _device_full(reason)


def _device_full(reason: str) -> DeviceFull:
    log.error("the device's memory isn't enough for one session's step: %s", reason)
    return DeviceFull(
        "the device's memory isn't enough for this request now; nothing else was hurt. Fewer sessions at once"
        " or a lower --device-state-bytes leave more room for a step",
        retry_after=RETRY_SECONDS,
    )
