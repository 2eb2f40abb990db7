"""Several engines as one: where work goes, when a state moves, and what is left when an engine ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import ConfigError, EngineUnavailable, QueueFull, UnknownHandle
from mnemosyne.engine.fleet import MOVABLE_TOKENS, Fleet
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.messages import INITIAL, Finished, Sampling
from mnemosyne.engine.scheduler import Limits
from tests.engine.fakes import INFO, FakeModel, dump, fake_engine, load

LONG = tuple(i * 7 % 39 for i in range(MOVABLE_TOKENS))
SHORT = LONG[: MOVABLE_TOKENS - 1]


@dataclass
class Pair:
    """Two engines in threads, whose models can be held up, behind one fleet with a clock of its own."""

    limits: dict[str, float]
    models: dict[str, FakeModel] = field(default_factory=dict)
    engines: dict[str, InlineEngine] = field(default_factory=dict)
    seconds: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            self.models[name] = FakeModel()
            self.engines[name] = InlineEngine(fake_engine(self.models[name], **self.limits))
        self.fleet = Fleet(self.engines, lambda: self.seconds)

    async def session(self, handle: str, device: str) -> None:
        """A state on ``device``; with nothing to do anywhere, the engine with fewest states has the next."""
        for ballast in (f"{handle} {i}" for i in range(10)):
            self.later()
            await self.fleet.advance(INITIAL, ballast, LONG)
            if self.fleet.device_of(ballast) == device:
                break
        self.fleet.release(ballast)
        self.later()
        await self.fleet.advance(INITIAL, handle, LONG)
        assert self.fleet.device_of(handle) == device
        for i in range(10):
            self.fleet.release(f"{handle} {i}")

    def readers(self, device: str, base: str, count: int) -> list[asyncio.Task[object]]:
        """Requests on ``device`` that go on until its gate opens."""
        self.models[device].gate.clear()
        return [
            asyncio.create_task(self.fleet.advance(base, f"{base} read {i}", SHORT)) for i in range(count)
        ]

    def load(self, device: str) -> float:
        [member] = [member for member in self.fleet._members if member.name == device]
        return member.expected

    def later(self, seconds: float = 60.0) -> None:
        self.seconds += seconds

    def open(self) -> None:
        for model in self.models.values():
            model.gate.set()


@pytest.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    made = Pair(getattr(request, "param", {}))
    await made.fleet.start()
    yield made
    made.open()
    await made.fleet.close()


async def alone(*parts: tuple[int, ...]) -> bytes:
    """The state that one engine makes of them."""
    engine = InlineEngine(fake_engine())
    await engine.start()
    base = INITIAL
    for i, part in enumerate(parts):
        await engine.advance(base, f"{i}", part)
        base = f"{i}"
    state = await engine.export(base)
    await engine.close()
    return state


async def answer(fleet: Fleet, base: str, result: str | None = None, max_tokens: int = 20) -> tuple[int, ...]:
    async for event in fleet.generate(base, result, (1, 2), Sampling(max_tokens=max_tokens, seed=4)):
        if isinstance(event, Finished):
            return event.tokens
    raise AssertionError


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


async def test_a_state_moves_from_a_loaded_device_and_stays_the_same(pair: Pair) -> None:
    fleet = pair.fleet
    await pair.session("mine", "a")
    others = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    before = asyncio.create_task(fleet.export("mine"))  # on its way at the old place while it moves
    pair.later()
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


async def test_readers_in_step_part_too(pair: Pair) -> None:
    """Both have come to the end of a piece when one of them asks for its next."""
    fleet = pair.fleet
    await pair.session("mine", "a")
    both = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    pair.later()
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
    second = asyncio.create_task(fleet.advance("first", "second", LONG * 400))
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
    await pair.session("mine", "a")
    others = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    pair.later()
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
    await pair.session("mine", "a")
    others = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    pair.later()
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
    await pair.session("mine", "a")
    others = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    pair.later()
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


async def test_an_engine_takes_only_its_own_handles(pair: Pair) -> None:
    fleet = pair.fleet
    await pair.session("on a", "a")
    await pair.session("on b", "b")
    lost: list[list[str]] = []
    fleet.on_lost(lambda: lost.append([h for h in ("on a", "on b", INITIAL) if not fleet.holds(h)]))
    running = pair.readers("a", "on a", 1)
    await asyncio.sleep(0.02)
    closing = asyncio.create_task(pair.engines["a"].close())
    await asyncio.sleep(0.02)
    pair.open()
    with pytest.raises(EngineUnavailable):
        await asyncio.gather(*running)
    await closing
    assert lost[0] == ["on a"] and fleet.ready
    with pytest.raises(UnknownHandle):
        await fleet.advance("on a", "next", LONG)
    await fleet.advance("on b", "next", LONG)
    assert await fleet.export("next") == await alone(LONG, LONG)
    for i in range(3):
        await fleet.advance(INITIAL, f"fresh {i}", LONG)
    stats = await fleet.device_stats()
    assert (stats["a"]["up"], stats["b"]["up"], "handles" in stats["a"]) == (0, 1, False)
    await pair.engines["b"].close()
    assert not fleet.ready
    with pytest.raises(EngineUnavailable):
        await fleet.advance(INITIAL, "fresh", LONG)


@pytest.mark.parametrize("dies", ["a", "b", "ab"])
async def test_a_move_loses_nothing_while_one_engine_lasts(pair: Pair, dies: str) -> None:
    """The state has left ``a`` and isn't bound on ``b`` yet, which is in the middle of a step."""
    fleet = pair.fleet
    await pair.session("mine", "a")
    others = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    pair.later()
    moving = asyncio.create_task(fleet.advance("mine", "next", LONG))
    await asyncio.sleep(0)
    pair.models["b"].entered.clear()
    pair.models["b"].gate.clear()
    held_up = asyncio.create_task(pair.engines["b"].advance(INITIAL, "a step", SHORT))
    while not pair.models["b"].entered.is_set():
        await asyncio.sleep(0.005)
    pair.models["a"].gate.set()
    await asyncio.gather(*others)
    await asyncio.sleep(0.05)
    assert fleet.device_of("mine") == "a"
    closing = [asyncio.create_task(pair.engines[name].close()) for name in dies]
    await asyncio.sleep(0.05)
    assert fleet.holds("mine")
    pair.open()
    await asyncio.gather(*closing, held_up, return_exceptions=True)
    if dies == "ab":
        with pytest.raises(EngineUnavailable):
            await moving
        assert not fleet.holds("mine") and not fleet.holds("next")
        return
    await moving
    assert fleet.device_of("mine") == fleet.device_of("next") == ("b" if dies == "a" else "a")
    assert await fleet.export("mine") == await alone(LONG)
    assert await fleet.export("next") == await alone(LONG, LONG)


async def test_a_move_whose_both_engines_end_is_told(pair: Pair) -> None:
    fleet = pair.fleet
    await pair.session("mine", "a")
    others = pair.readers("a", "mine", 2)
    await asyncio.sleep(0)
    pair.later()
    moving = asyncio.create_task(fleet.advance("mine", "next", LONG))
    await asyncio.sleep(0.02)
    closing = asyncio.create_task(fleet.close())
    await asyncio.sleep(0.02)
    pair.open()
    await closing
    with pytest.raises(EngineUnavailable):
        await moving
    await asyncio.gather(*others, return_exceptions=True)
    assert not fleet.holds("mine") and not fleet.holds("next")


async def test_an_engine_that_comes_back_with_other_weights_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    command = [sys.executable, str(Path(__file__).with_name("fake_process.py")), "--other", str(other)]
    engines = {name: EngineClient(command, name=name, first_delay=0.01) for name in ("a", "b")}
    fleet = Fleet(engines)
    await fleet.start()
    other.touch()
    await fleet.advance(INITIAL, "on a", LONG)
    killed = engines["a"]
    assert fleet.device_of("on a") == "a" and killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    while killed.incarnation < 2:
        await asyncio.sleep(0.02)
    assert killed.ready and fleet.ready and not fleet.holds("on a")
    for i in range(3):
        await fleet.advance(INITIAL, f"{i}", LONG)
        assert fleet.device_of(f"{i}") == "b"
    assert "its model is another and not m" in caplog.text
    stats = await fleet.device_stats()
    assert (stats["a"]["up"], stats["b"]["up"]) == (0, 1)
    await fleet.close()


async def test_devices_that_compute_otherwise_are_refused() -> None:
    other = replace(INFO, numerics_fingerprint="other", numerics={"device": "cpu", "kind": "old"})
    engines = [InlineEngine(Engine(FakeModel(), info, Limits(), dump, load)) for info in (INFO, other)]
    fleet = Fleet(dict(zip(("cuda:0", "cuda:1"), engines, strict=True)))
    with pytest.raises(ConfigError, match="cuda:1 differs from cuda:0: kind is old and not None"):
        await fleet.start()
    assert not any(engine.ready for engine in engines) and not fleet.ready
    engines = [
        InlineEngine(Engine(FakeModel(), info, Limits(), dump, load))
        for info in (INFO, replace(INFO, model_fingerprint="another"))
    ]
    with pytest.raises(ConfigError, match="its model is another and not m"):
        await Fleet(dict(zip(("cuda:0", "cuda:1"), engines, strict=True))).start()
