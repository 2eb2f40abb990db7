"""What is left of a fleet when an engine ends, or comes back as another."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import ConfigError, EngineUnavailable, UnknownHandle
from mnemosyne.engine.fleet import Fleet
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.messages import INITIAL
from mnemosyne.engine.scheduler import Limits
from tests.engine.fakes import INFO, FakeModel, dump, load
from tests.engine.fleet_pair import LONG, SHORT, Pair, alone


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
    others = await pair.crowded("mine", "a")
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
    others = await pair.crowded("mine", "a")
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
