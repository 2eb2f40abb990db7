"""Several engines as one: where work goes, and which states are brought elsewhere for balance."""

from __future__ import annotations

import asyncio

from mnemosyne.engine.messages import INITIAL
from tests.engine.fleet_pair import LONG, SHORT, Pair, alone


async def test_fresh_sessions_go_where_least_is_to_do(pair: Pair) -> None:
    for model in pair.models.values():
        model.gate.clear()
    tasks = [asyncio.create_task(pair.fleet.advance(INITIAL, f"{i}", LONG)) for i in range(6)]
    await asyncio.sleep(0)
    assert sorted(str(pair.fleet.device_of(f"{i}")) for i in range(6)) == ["a"] * 3 + ["b"] * 3
    pair.open()
    await asyncio.gather(*tasks)
    pair.later()
    # Nothing is to do anywhere: the one that holds fewer states has the next.
    on_b = [handle for handle in map(str, range(6)) if pair.fleet.device_of(handle) == "b"]
    for i, handle in enumerate(on_b):
        pair.fleet.release(handle)
        await pair.fleet.load(f"loaded {i}", await alone(LONG))
        assert pair.fleet.device_of(f"loaded {i}") == "b"
        await pair.fleet.advance(f"loaded {i}", f"on it {i}", SHORT)
        assert pair.fleet.device_of(f"on it {i}") == "b", "a request goes where its base is"
        pair.fleet.release(f"on it {i}")
        pair.later()


async def test_readers_in_step_part_too(pair: Pair) -> None:
    """Both have come to the end of a piece when one of them asks for its next."""
    fleet = pair.fleet
    both = await pair.crowded("mine", "a")
    pair.open()
    await asyncio.gather(*both)
    going = [asyncio.create_task(fleet.advance(f"mine read {i}", f"next {i}", LONG)) for i in range(2)]
    await asyncio.gather(*going)
    assert [fleet.device_of(f"next {i}") for i in range(2)] == ["b", "a"]


async def test_a_session_that_asks_ahead_moves_when_its_piece_has_been_read(pair: Pair) -> None:
    """Each piece is sent on top of one that isn't read yet. Only one is weighed, and none flees from it."""
    fleet = pair.fleet
    await pair.session("mine", "a")
    pair.models["a"].gate.clear()
    mine = [asyncio.create_task(fleet.advance("mine", "piece 0", LONG))]
    await asyncio.sleep(0)
    pair.later()
    for i in range(3):
        mine.append(asyncio.create_task(fleet.advance(f"piece {i}", f"piece {i + 1}", LONG)))
        await asyncio.sleep(0)
        pair.later()
        assert fleet.device_of(f"piece {i + 1}") == "a"
        assert round(pair.load("a"), 3) == 1
    other = pair.readers("a", "mine", 1)
    await asyncio.sleep(0)
    pair.later()
    mine.append(asyncio.create_task(fleet.advance("piece 3", "piece 4", LONG)))
    await asyncio.sleep(0.02)
    assert fleet.device_of("piece 3") == "a"
    pair.later()
    pair.open()
    await asyncio.gather(*mine, *other)
    assert fleet._moves._seconds < 1, "the minute before it could begin isn't the move's"
    assert fleet.device_of("piece 3") == fleet.device_of("piece 4") == "b"
    assert await fleet.export("piece 4") == await alone(*[LONG] * 6)
    pair.later()
    assert round(pair.load("a"), 3) == round(pair.load("b"), 3) == 0


async def test_what_waits_for_its_base_weighs_from_then_on_and_until_it_ends(pair: Pair) -> None:
    fleet = pair.fleet
    pair.models["a"].gate.clear()
    first = asyncio.create_task(fleet.advance(INITIAL, "first", LONG))
    await asyncio.sleep(0)
    second = asyncio.create_task(fleet.advance("first", "second", LONG * 50))
    left = asyncio.create_task(fleet.advance("first", "left", LONG))
    await asyncio.sleep(0)
    left.cancel()
    pair.later()
    assert round(pair.load("a"), 3) == 1
    pair.open()
    await first
    pair.later()
    assert not second.done() and round(pair.load("a"), 3) == 1
    await second
    pair.later()
    assert round(pair.load("a"), 3) == 0


async def test_what_does_not_move(pair: Pair) -> None:
    fleet = pair.fleet
    await pair.session("mine", "a")
    pair.later()
    others = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    burst = asyncio.create_task(fleet.advance("mine", "in a burst", LONG))
    await asyncio.sleep(0)
    assert fleet.device_of("in a burst") == "a", "a burst isn't a load"
    pair.later()
    short = asyncio.create_task(fleet.advance("mine", "short", SHORT))
    await asyncio.sleep(0)
    assert fleet.device_of("short") == "a", "it is done before a move would be"
    pair.open()
    await asyncio.gather(*others, burst, short)
    pair.later()
    one = pair.readers("a", "short", 1)
    await asyncio.sleep(0)
    pair.later()
    pair.models["b"].gate.clear()
    fresh = asyncio.create_task(fleet.advance(INITIAL, "fresh", LONG))
    await asyncio.sleep(0)
    assert fleet.device_of("fresh") == "b"
    balanced = asyncio.create_task(fleet.advance("mine", "balanced", LONG))
    await asyncio.sleep(0)
    assert fleet.device_of("balanced") == "a", "the other has as much to do"
    more = asyncio.create_task(fleet.advance(INITIAL, "more", LONG))
    await asyncio.sleep(0)
    assert fleet.device_of("more") == "b"
    pair.later()
    pair.models["b"].gate.set()
    await asyncio.gather(fresh, more)
    lull = asyncio.create_task(fleet.advance("mine", "in a lull", LONG))
    await asyncio.sleep(0)
    assert fleet.device_of("in a lull") == "a", "the other is between two pieces"
    pair.open()
    await asyncio.gather(*one, balanced, lull)
    assert (await fleet.device_stats())["a"]["device_moves_out_total"] == 0


async def test_a_state_that_has_just_come_stays(pair: Pair) -> None:
    """A move that takes long is made less often."""
    fleet = pair.fleet
    others = await pair.crowded("mine", "a")
    moving = asyncio.create_task(fleet.advance("mine", "moved", LONG))
    await asyncio.sleep(0.02)
    pair.later(20.0)
    pair.open()
    await asyncio.gather(moving, *others)
    assert fleet.device_of("moved") == "b"
    others = pair.readers("b", "moved", 2)
    await asyncio.sleep(0)
    for seconds, result in ((30.0, "stays"), (60.0, "goes")):
        pair.later(seconds)
        going = asyncio.create_task(fleet.advance("moved", result, LONG))
        await asyncio.sleep(0)
        others.append(going)
    pair.open()
    await asyncio.gather(*others)
    assert (fleet.device_of("stays"), fleet.device_of("goes")) == ("b", "a")
    assert await fleet.export("stays") == await fleet.export("goes") == await alone(LONG, LONG, LONG)
