"""A source of items that runs in a task of its own. Owns its end and its cancellation; knows no HTTP and no
item.

The reader may go at any moment: ``close`` only asks the task to end, and the source's own clean-up runs
there, out of reach of the cancellation that took the reader.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")


class Silence:
    """The type of ``SILENCE``."""


SILENCE: Final = Silence()
"""What ``next`` gives when nothing came in time."""

_running: set[asyncio.Task[None]] = set()
"""Keeps the tasks alive that nobody reads any more."""


class Relay(Generic[Item]):
    """Reads ``source`` at once and keeps what comes until it is asked for."""

    def __init__(self, source: AsyncGenerator[Item, None]) -> None:
        self._items: deque[Item] = deque()
        self._end: Exception | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read(source))
        _running.add(self._task)
        self._task.add_done_callback(_running.discard)

    async def settle(self, seconds: float) -> None:
        """Wait until something came, at most ``seconds``; raise the source's failure if that came first."""
        await self._wait(seconds)
        if not self._items and self._end is not None and not isinstance(self._end, StopAsyncIteration):
            raise self._end

    async def next(self, timeout: float | None = None) -> Item | Silence:
        """The next item, ``SILENCE`` after ``timeout`` seconds, StopAsyncIteration at the end, or the
        failure."""
        if not await self._wait(timeout):
            return SILENCE
        if self._items:
            return self._items.popleft()
        assert self._end is not None
        raise self._end

    def close(self) -> None:
        """Ask the source to end where it stands; nothing to do for one that has ended."""
        self._task.cancel()

    async def _wait(self, timeout: float | None) -> bool:
        if not self._items and self._end is None:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
            except TimeoutError:
                return False
        return True

    async def _read(self, source: AsyncGenerator[Item, None]) -> None:
        end: Exception = StopAsyncIteration()
        try:
            async for item in source:
                self._items.append(item)
                self._changed.set()
        except Exception as error:
            end = error
        finally:
            self._end = end
            self._changed.set()
            await source.aclose()
