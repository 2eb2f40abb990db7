"""States that come in and go out as bytes, one at a time. Owns their queue and their answers; the form of the
bytes is the caller's, and where states are read from is whichever tier they are in."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from mnemosyne.engine import device
from mnemosyne.engine.counters import Counters
from mnemosyne.engine.desk import Desk
from mnemosyne.engine.errors import EngineError, MnemosyneError
from mnemosyne.engine.jobs import Job
from mnemosyne.engine.messages import Exported, Load, Loaded, ReadTrace, TraceReport
from mnemosyne.engine.pyramid import Pyramid
from mnemosyne.engine.relief import Relief
from mnemosyne.engine.state import SessionState


class Transfers:
    def __init__(
        self,
        desk: Desk,
        relief: Relief,
        counters: Counters,
        dump: Callable[[SessionState], bytes],
        load: Callable[[bytes], SessionState],
    ) -> None:
        """``load`` checks what it is given."""
        self._desk, self._relief, self._counters = desk, relief, counters
        self._dump, self._load = dump, load
        self._queue: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, job: Job) -> None:
        """An Export, Load or ReadTrace whose base is known."""
        self._queue.append(job)

    def next(self) -> None:
        """Make the first of them."""
        if not self._queue or (job := self._queue.popleft()).id not in self._desk.jobs:
            return
        began = time.perf_counter()
        try:
            self._make(job)
        except MnemosyneError as error:
            self._desk.fail(job, error)
        except Exception as error:
            if device.lost():
                raise
            self._desk.fail(
                job, EngineError(f"a state couldn't be transferred: {type(error).__name__}: {error}")
            )
        self._counters.add("transfer_seconds_total", time.perf_counter() - began)

    def _make(self, job: Job) -> None:
        request = job.request
        if isinstance(request, Load):
            state = self._relief.alone(lambda: self._load(request.data), job)
            seen = state.tokens_seen
            loaded = Loaded(request_id=job.id, position=state.position, tokens_seen=seen)
            self._desk.finish(job, state, loaded)
            return
        if isinstance(request, ReadTrace):
            self._desk.finish(job, _base(job), _told(job.id, _base(job).pyramid))
            return
        data = self._relief.alone(lambda: self._dump(_base(job)), job)
        self._desk.finish(job, _base(job), Exported(request_id=job.id, data=data))


def _base(job: Job) -> SessionState:
    """Asked for anew each time: it may move to another tier meanwhile."""
    state = None if job.base is None else job.base.state
    assert state is not None
    return state


def _told(request_id: str, pyramid: Pyramid) -> TraceReport:
    levels = pyramid.array()
    data = levels.astype("<f4").tobytes()
    return TraceReport(request_id=request_id, chunks=pyramid.chunks, layers=levels.shape[2], data=data)
