"""A session's event stream: a bounded list in memory, with ids that rise. Knows no session and no
transport."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from mnemosyne.server.sessions.views import EventKind, SessionEvent

KEPT = 1000


class EventLog:
    """Ids begin at the time of making in microseconds, so that they rise over restarts too."""

    def __init__(self) -> None:
        self._kept: deque[SessionEvent] = deque(maxlen=KEPT)
        self._next = time.time_ns() // 1000
        self._changed = asyncio.Condition()
        self._waker: asyncio.Task[None] | None = None
        self._ended = False
        self.readers = 0

    def add(self, kind: EventKind, data: dict[str, Any]) -> None:
        self._kept.append(SessionEvent(id=self._next, kind=kind, at=time.time(), data=data))
        self._next += 1
        self._wake()

    def end(self) -> None:
        """Let every reader finish: the session is gone or the server stops."""
        self._ended = True
        self._wake()

    async def follow(self, last_event_id: int | None) -> AsyncIterator[SessionEvent]:
        """Kept events after ``last_event_id`` (None: only those to come), then each as it happens."""
        last = self._next - 1 if last_event_id is None else last_event_id
        self.readers += 1
        try:
            while True:
                for event in [event for event in self._kept if event.id > last]:
                    last = event.id
                    yield event
                if self._ended:
                    return
                async with self._changed:
                    while not self._ended and not (self._kept and self._kept[-1].id > last):
                        await self._changed.wait()
        finally:
            self.readers -= 1

    def _wake(self) -> None:
        if self.readers and (self._waker is None or self._waker.done()):
            self._waker = asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
