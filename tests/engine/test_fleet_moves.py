"""A state on its way from one engine to another: it stays the same, and nobody who uses it notices."""

from __future__ import annotations

import asyncio
import time

import pytest

from mnemosyne.engine.errors import QueueFull, UnknownHandle
from mnemosyne.engine.messages import INITIAL
from tests.engine.fleet_pair import LONG, SHORT, Pair, alone, answer


async def test_a_state_moves_from_a_loaded_device_and_stays_the_same(pair: Pair) -> None:
    fleet = pair.fleet
    others = await pair.crowded("mine", "a")
    before = asyncio.create_task(fleet.export("mine"))  # on its way at the old place while it moves
    moving = asyncio.create_task(fleet.advance("mine", "next", LONG))
    await asyncio.sleep(0.05)
    assert fleet.device_of("mine") == "a", "a device in the middle of a step gives nothing away"
    pair.open()
    await moving
    assert fleet.device_of("mine") == fleet.device_of("next") == "b"
    assert await before == await fleet.export("mine") == await alone(LONG)
    assert await fleet.export("next") == await alone(LONG, LONG)
    await asyncio.gather(*others)
    assert await fleet.export("mine read 0") == await alone(LONG, SHORT)
    assert fleet.device_of("mine read 0") == "a"
    stats = await fleet.device_stats()
    assert (stats["a"]["device_moves_out_total"], stats["b"]["device_moves_in_total"]) == (1, 1)
    assert stats["a"]["handles"] == 3, "the beginning and two results, not what moved"
    assert stats["b"]["handles"] == 3
    assert await answer(fleet, "mine") == await answer(fleet, "mine")


@pytest.mark.parametrize("pair", [{"max_requests": 2}], indirect=True)
async def test_a_full_device_hands_over(pair: Pair) -> None:
    fleet = pair.fleet
    await pair.session("mine", "a")
    full = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    over = asyncio.create_task(fleet.advance("mine", "over", SHORT))
    answering = asyncio.create_task(answer(fleet, "mine"))
    await asyncio.sleep(0.05)
    pair.models["a"].gate.set()
    await asyncio.gather(over, answering, *full)
    assert fleet.device_of("mine") == fleet.device_of("over") == "b"
    assert await fleet.export("over") == await alone(LONG, SHORT)
    endless = [
        asyncio.create_task(answer(fleet, INITIAL, f"endless {i}", max_tokens=10**9)) for i in range(4)
    ]
    await asyncio.sleep(0.05)
    assert [fleet.device_of(f"endless {i}") for i in range(4)].count("a") == 2
    for base in ("mine", INITIAL):
        with pytest.raises(QueueFull):
            await fleet.advance(base, "refused", LONG)
    assert not fleet.holds("refused") and fleet.holds("mine")
    for task in endless:
        task.cancel()
    await asyncio.gather(*endless, return_exceptions=True)
    await fleet.advance("mine", "refused", LONG)
    assert await fleet.export("refused") == await alone(LONG, LONG)


async def test_calls_may_build_on_one_that_waits_for_a_move(pair: Pair) -> None:
    fleet = pair.fleet
    others = await pair.crowded("mine", "a")
    chain = [
        asyncio.create_task(fleet.advance(base, result, LONG))
        for base, result in (("mine", "one"), ("one", "two"), ("two", "three"))
    ]
    exported = asyncio.create_task(fleet.export("three"))
    await asyncio.sleep(0)
    for handle in ("mine", "one", "two", "three"):
        fleet.release(handle)
        assert not fleet.holds(handle)
    pair.open()
    await asyncio.gather(*chain, *others)
    assert await exported == await alone(LONG, LONG, LONG, LONG)
    stats = await fleet.device_stats()
    assert (stats["a"]["device_moves_out_total"], stats["b"]["handles"], stats["a"]["handles"]) == (1, 1, 3)


async def test_a_caller_that_leaves_amid_a_move_leaves_nothing(pair: Pair) -> None:
    fleet = pair.fleet
    others = await pair.crowded("mine", "a")
    leaving = asyncio.create_task(fleet.advance("mine", "next", LONG))
    await asyncio.sleep(0.02)
    waiting = asyncio.create_task(fleet.advance("next", "after", LONG))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(UnknownHandle):
        await waiting
    assert not fleet.holds("next") and not fleet.holds("after")
    pair.open()
    await asyncio.gather(*others)
    assert await fleet.export("mine") == await alone(LONG)
    await fleet.advance("mine", "next", LONG)
    assert await fleet.export("next") == await alone(LONG, LONG)


async def test_a_caller_that_leaves_when_its_result_is_there_leaves_nothing(pair: Pair) -> None:
    task = asyncio.create_task(pair.fleet.advance(INITIAL, "mine", LONG))
    await asyncio.sleep(0)
    time.sleep(0.2)  # the engine ends, and nobody here has heard of it
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not pair.fleet.holds("mine")
    assert (await pair.fleet.stats())["handles"] == 2, "the beginnings"
