"""Where requests come in and answers go out. Owns the handles, the accepted requests and their events; knows
no model and doesn't decide what is computed when, nor where states are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mnemosyne.engine.counters import Counters
from mnemosyne.engine.errors import (
    Cancelled,
    CapacityError,
    EngineError,
    MnemosyneError,
    RequestError,
    UnknownHandle,
)
from mnemosyne.engine.holdings import Holdings, Running
from mnemosyne.engine.ids import Ids, within
from mnemosyne.engine.jobs import Job, Slot, Work
from mnemosyne.engine.messages import (
    INITIAL,
    MAX_TRACED_TOKENS,
    Advance,
    Event,
    Export,
    Failed,
    Generate,
    Load,
    ReadTrace,
    TraceTokens,
)
from mnemosyne.engine.sampling import Sampler
from mnemosyne.engine.scheduler import Scheduler
from mnemosyne.engine.state import GENERATED, INPUT, SessionState


class Desk:
    """Requests from acceptance to their end. Whoever ends one calls ``finish`` or ``fail``, exactly once."""

    def __init__(
        self,
        initial: SessionState,
        holdings: Holdings,
        scheduler: Scheduler,
        counters: Counters,
        vocab_size: int,
    ) -> None:
        self.jobs: dict[str, Job] = {}
        first = Slot()
        # Every state that has committed nothing shares these tensors.
        first.bind(initial, holdings.hold(initial.tensors, fixed=True))
        self._slots: dict[str, Slot] = {INITIAL: first}
        self._unblocked: deque[Job] = deque()
        self._events: list[Event] = []
        self._holdings = holdings
        self._scheduler = scheduler
        self._counters = counters
        self._vocab_size = vocab_size

    def accept(self, request: Work) -> None:
        """Take the request, or answer it with Failed and change nothing."""
        try:
            self._accept(request)
        except MnemosyneError as error:
            refused = (
                "requests_rejected_total" if isinstance(error, CapacityError) else "requests_failed_total"
            )
            self._counters.add(refused)
            self.say(_failed(request.request_id, error))

    def ready(self) -> Iterator[Job]:
        """Every request whose base has come to be since; those whose base failed fail here, with its
        error."""
        while self._unblocked:
            job = self._unblocked.popleft()
            if job.id not in self.jobs:
                continue
            if job.base is not None and job.base.error is not None:
                self.fail(job, job.base.error)
            else:
                yield job

    @property
    def unblocked(self) -> bool:
        """``ready`` would yield or fail something."""
        return bool(self._unblocked)

    def say(self, event: Event) -> None:
        self._events.append(event)

    def events(self) -> list[Event]:
        """What was said since the last call."""
        events, self._events = self._events, []
        return events

    def finish(self, job: Job, state: SessionState, event: Event) -> None:
        """End the request with ``event``, its last; ``state`` is bound to its result, if it has one."""
        self.say(event)
        self._counters.add("requests_finished_total")
        self._forget(job)
        if job.result is not None:
            job.result.bind(state, self._holdings.hold(state.tensors))
            self._unblock(job.result)

    def fail(self, job: Job, error: MnemosyneError) -> None:
        """End the request, and everything that waits for its result, with ``error``; its base stays as it
        is."""
        self.say(_failed(job.id, error))
        self._counters.add(
            "requests_cancelled_total" if isinstance(error, Cancelled) else "requests_failed_total"
        )
        self._forget(job)
        if job.result is not None:
            job.result.error = error
            for handle in [name for name, slot in self._slots.items() if slot is job.result]:
                del self._slots[handle]
            self._unblock(job.result)

    def cancel(self, request_id: str) -> None:
        """Unknown ids are ignored: the request may just have ended."""
        job = self.jobs.get(request_id)
        if job is not None:
            self.fail(job, Cancelled("the request was cancelled"))

    def release(self, handle: str) -> None:
        if handle != INITIAL:
            self._slots.pop(handle, None)

    def running(self) -> list[Running]:
        """What the requests under way keep on the device."""
        return [job.running for job in self.jobs.values() if job.admitted]

    def gauges(self) -> dict[str, float]:
        states = [slot.state for slot in self._slots.values() if slot.state is not None]
        # A state that several handles share is held once.
        held = {id(state.tensors): state.nbytes for state in states}
        running = self._scheduler.ingesting + self._scheduler.decoding
        return {
            "requests_running": running,
            "requests_waiting": len(self.jobs) - running,
            "requests_ingesting": self._scheduler.ingesting,
            "requests_decoding": self._scheduler.decoding,
            "queued_tokens": self._scheduler.queued_tokens,
            "handles": len(self._slots),
            "state_bytes": sum(held.values()),
            **self._holdings.gauges(),
        }

    def _accept(self, request: Work) -> None:
        if request.request_id in self.jobs:
            raise EngineError(f"request id {request.request_id!r} is in use")
        base = None if isinstance(request, Load) else self._find(_base(request))
        target = _target(request)
        if target is not None and target in self._slots:
            raise EngineError(f"handle {target!r} is bound already; a result needs a new one")
        if target is not None:
            self._holdings.admit(sum(job.result is not None for job in self.jobs.values()))
        job = Job(request=request, base=base, result=None if target is None else Slot())
        if isinstance(request, Advance):
            job.tokens = self._ids(request.tokens, "tokens")
            if request.kinds is not None and not _valid_kinds(request.kinds, len(request.tokens)):
                raise RequestError("kinds must be one byte, 0 or 1, for each token", param="kinds")
            self._scheduler.accept(job.id, request.tenant, len(request.tokens))
        elif isinstance(request, Generate):
            job.tokens = self._ids(request.prompt, "prompt")
            job.sampler = Sampler(request.sampling, request.prompt, self._vocab_size)
            self._scheduler.accept(job.id, request.tenant, len(request.prompt))
        elif isinstance(request, TraceTokens):
            job.tokens = self._ids(request.tokens, "tokens")
            if not 0 < len(request.tokens) <= MAX_TRACED_TOKENS:
                raise RequestError(
                    f"values per token are computed for 1 to {MAX_TRACED_TOKENS} tokens at once, not for"
                    f" {len(request.tokens)}",
                    param="tokens",
                )
            self._scheduler.accept(job.id, request.tenant, len(request.tokens))
        self.jobs[job.id] = job
        if target is not None and job.result is not None:
            self._slots[target] = job.result
        if base is not None and base.held is not None:
            self._holdings.use(base.held)
        if base is None or base.settled:
            self._unblocked.append(job)
        else:
            base.waiting.append(job)

    def _find(self, handle: str) -> Slot:
        slot = self._slots.get(handle)
        if slot is None:
            raise UnknownHandle(f"no state {handle!r} is held by this engine", handle=handle)
        return slot

    def _ids(self, tokens: tuple[int, ...], param: str) -> Ids:
        try:
            return within(tokens, 0, self._vocab_size)
        except OverflowError as error:
            raise RequestError(f"token ids must be 0 to {self._vocab_size - 1}", param=param) from error

    def _unblock(self, slot: Slot) -> None:
        self._unblocked.extend(slot.waiting)
        slot.waiting.clear()

    def _forget(self, job: Job) -> None:
        del self.jobs[job.id]
        self._scheduler.finish(job.id)


def _base(request: Advance | Generate | Export | ReadTrace | TraceTokens) -> str:
    return request.handle if isinstance(request, Export | ReadTrace) else request.base


def _target(request: Work) -> str | None:
    match request:
        case Export() | ReadTrace() | TraceTokens():
            return None
        case Load():
            return request.handle
        case _:
            return request.result


def _valid_kinds(kinds: bytes, length: int) -> bool:
    return len(kinds) == length and not kinds.strip(bytes([INPUT, GENERATED]))


def _failed(request_id: str, error: MnemosyneError) -> Failed:
    return Failed(
        request_id=request_id,
        error=type(error).__name__,
        message=error.message,
        attributes=dict(error.attributes),
    )
