"""A relay reads on its own, tells of silence, and cleans its source up whoever ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from mnemosyne.server.relay import SILENCE, Relay


async def test_items_then_the_end() -> None:
    async def source() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    relay = Relay(source())
    assert [await relay.next(), await relay.next()] == [1, 2]
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await relay.next()


async def test_silence_loses_nothing() -> None:
    go = asyncio.Event()

    async def source() -> AsyncGenerator[int, None]:
        await go.wait()
        yield 1

    relay = Relay(source())
    assert await relay.next(0.01) is SILENCE
    go.set()
    assert await relay.next(1) == 1


async def test_an_early_failure_is_raised_by_settle_and_a_late_one_in_its_place() -> None:
    async def early() -> AsyncGenerator[int, None]:
        raise ValueError("early")
        yield 1

    async def late() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("late")

    with pytest.raises(ValueError, match="early"):
        await Relay(early()).settle(1)
    relay = Relay(late())
    await relay.settle(1)
    assert await relay.next() == 1
    with pytest.raises(ValueError, match="late"):
        await relay.next()


async def test_closing_ends_the_source_where_it_stands_and_lets_it_clean_up() -> None:
    cleaned = asyncio.Event()

    async def source() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)  # a clean-up that awaits must run to its end
            cleaned.set()

    relay = Relay(source())
    assert await relay.next() == 1
    relay.close()
    await asyncio.wait_for(cleaned.wait(), 1)
