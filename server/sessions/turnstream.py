"""What a turn gives to whoever waits for it. Owns the queue between the two and what leaving means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from mnemosyne.server.sessions.views import Answer, Delta


class TurnStream:
    """Iterate for Delta..., then one Answer; a failure of the run is raised in between. ``aclose`` it when
    leaving."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Delta | Answer | Exception] = asyncio.Queue()
        self._ended = False
        self._task: asyncio.Task[None] | None = None
        self._may_cancel: Callable[[], bool] = lambda: False
        self.let_go = asyncio.Event()
        """Set once the turn has let go of its session."""

    def runs_in(self, task: asyncio.Task[None], may_cancel: Callable[[], bool]) -> None:
        """The turn runs in ``task``; leaving cancels it where ``may_cancel`` says so."""
        self._task, self._may_cancel = task, may_cancel

    def put(self, item: Delta | Answer | Exception) -> None:
        self._queue.put_nowait(item)

    def __aiter__(self) -> AsyncIterator[Delta | Answer]:
        return self

    async def __anext__(self) -> Delta | Answer:
        if self._ended:
            raise StopAsyncIteration
        item = await self._queue.get()
        self._ended = not isinstance(item, Delta)
        if isinstance(item, Exception):
            raise item
        return item

    async def aclose(self) -> None:
        """Leave. Returns when a turn that was cancelled so has let go of its session."""
        self._ended = True
        if self._task is not None and not self._task.done() and self._may_cancel():
            self._task.cancel()
            await self.let_go.wait()


def given_again(answer: Answer) -> TurnStream:
    """The stream of an answer that was given before."""
    stream = TurnStream()
    if answer.text or answer.tokens:
        stream.put(Delta(text=answer.text, tokens=answer.tokens))
    stream.put(answer)
    return stream
