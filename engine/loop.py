"""The loop of one engine: takes requests from any thread, computes on the thread that runs it, hands events
on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from mnemosyne.engine.engine import Engine
from mnemosyne.engine.messages import Event, Request


class Loop:
    """``run`` blocks until ``stop``; ``post`` and ``stop`` may be called from any thread."""

    def __init__(self, engine: Engine, emit: Callable[[Sequence[Event]], None]) -> None:
        """``emit`` is called on the running thread, with at least one event."""
        self._engine = engine
        self._emit = emit
        self._inbox: deque[Request] = deque()
        self._news = threading.Condition()
        self._stopped = False

    def post(self, request: Request) -> None:
        with self._news:
            self._inbox.append(request)
            self._news.notify()

    def stop(self) -> None:
        """The step in progress is the last."""
        with self._news:
            self._stopped = True
            self._news.notify()

    def run(self) -> None:
        while True:
            with self._news:
                while not (self._stopped or self._inbox) and self._engine.idle:
                    self._news.wait()
                if self._stopped:
                    return
                requests = list(self._inbox)
                self._inbox.clear()
            events = [event for request in requests for event in self._engine.accept(request)]
            if events:
                self._emit(events)
            events = self._engine.step()
            if events:
                self._emit(events)
