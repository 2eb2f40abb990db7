"""The asyncio side: the same tests over an engine in a thread, one in a real process and two behind a fleet,
then what only a process does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.errors import (
    Cancelled,
    ConfigError,
    EngineError,
    EngineUnavailable,
    NotFinite,
    QueueFull,
    RequestError,
    SnapshotCorrupt,
    UnknownHandle,
)
from mnemosyne.engine.fleet import Fleet
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import INITIAL, MAX_TRACED_TOKENS, Finished, Progress, Sampling, Token
from tests.engine.fakes import CHUNK, INFO, POISON, FakeModel, fake_engine

FAKE = Path(__file__).with_name("fake_process.py")


def command(*options: str) -> list[str]:
    return [sys.executable, str(FAKE), *options]


def ids(count: int) -> tuple[int, ...]:
    return tuple(i * 7 % 39 for i in range(count))


def made_as(kind: str) -> EngineLike:
    if kind == "inline":
        return InlineEngine(fake_engine())
    if kind == "process":
        return EngineClient(command())
    return Fleet({name: InlineEngine(fake_engine()) for name in ("cpu#0", "cpu#1")})


@pytest_asyncio.fixture(params=["inline", "process", "fleet"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[EngineLike]:
    made = made_as(request.param)
    with pytest.raises(EngineUnavailable):
        await made.stats()
    with pytest.raises(EngineUnavailable):
        _ = made.info
    made.release("nothing")
    assert (made.ready, made.incarnation) == (False, 0)
    await made.start()
    yield made
    await made.close()
    await made.close()
    assert not made.ready
    with pytest.raises(EngineUnavailable):
        await made.stats()


async def finish(engine: EngineLike, *args: object, **more: object) -> Finished:
    async for event in engine.generate(*args, **more):  # type: ignore[arg-type]
        if isinstance(event, Finished):
            return event
    raise AssertionError


async def until(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_everything_once(engine: EngineLike) -> None:
    assert engine.info.max_queued_tokens > 0 and engine.info.model_fingerprint == INFO.model_fingerprint
    assert (engine.ready, engine.incarnation) == (True, 1)
    beginnings = await handles(engine)
    progress: list[Progress] = []
    done = await engine.advance(INITIAL, "a", ids(103), tenant="t", on_progress=progress.append)
    assert (done.position, done.tokens_seen) == (100, 103)
    assert progress[-1].tokens_done == 100
    sampling = Sampling(max_tokens=9, seed=3, logprobs=1)
    events = [
        event async for event in engine.generate("a", "b", ids(5), sampling, on_progress=progress.append)
    ]
    assert [type(event) for event in events] == [Token] * 9 + [Finished]
    assert progress[-1].tokens_done >= 5
    data = await engine.export("b")
    loaded = await engine.load("c", data)
    assert loaded.tokens_seen == 103 + 5 + 9
    assert await engine.export("c") == data
    one, two = await asyncio.gather(
        finish(engine, "b", None, (1,), sampling), finish(engine, "c", None, (1,), sampling)
    )
    assert one.tokens == two.tokens
    stats = await engine.stats()
    assert stats["tokens_generated_total"] == 27 and stats["handles"] == beginnings + 3
    engine.release("c")
    assert await handles(engine) == beginnings + 2
    by_device = await engine.device_stats()
    assert sum(numbers["handles"] for numbers in by_device.values()) == beginnings + 2
    assert all(numbers["up"] == 1 and numbers["restarts_total"] == 0 for numbers in by_device.values())


async def handles(engine: EngineLike) -> float:
    return (await engine.stats())["handles"]


async def test_it_knows_which_handles_it_holds(engine: EngineLike) -> None:
    assert engine.holds(INITIAL) and not engine.holds("a")
    reading = asyncio.create_task(engine.advance(INITIAL, "a", ids(30)))
    await asyncio.sleep(0)
    assert engine.holds("a"), "it will be bound"
    await reading
    await engine.load("b", await engine.export("a"))
    assert engine.holds("a") and engine.holds("b")
    with pytest.raises(EngineError, match="bound already"):
        await engine.advance("b", "a", ids(3))
    assert engine.holds("a")
    with pytest.raises(NotFinite):
        await engine.advance("a", "c", (POISON,) * 9)
    stream = engine.generate("a", "d", ids(3), Sampling(max_tokens=10**9))
    await anext(stream)
    await stream.aclose()
    engine.release("a")
    assert [handle for handle in "abcd" if engine.holds(handle)] == ["b"]
    assert await handles(engine) == len(await engine.device_stats()) + 1, "nothing is kept by the way"


async def test_what_was_read_can_be_traced(engine: EngineLike) -> None:
    tokens = ids(103)
    await engine.advance(INITIAL, "a", tokens)
    pyramid = await engine.trace("a")
    points = list(pyramid.cover(0, 100, 0))
    assert [(point.first, point.last) for point in points] == [(i, i + 1) for i in range(25)]
    assert [float(point.values[0, 0]) for point in points] == [
        sum(tokens[i : i + CHUNK]) / CHUNK for i in range(0, 100, CHUNK)
    ]
    # The base has a pending token, which isn't asked about.
    values = await engine.trace_tokens("a", (9, 1, 2, 3, 4), tenant="t")
    assert values.shape == (5, 1, 2) and values[:, 0, 0].tolist() == [9, 1, 2, 3, 4]
    assert (await engine.trace("a")).array().tobytes() == pyramid.array().tobytes(), "nothing was learned"
    assert await handles(engine) == len(await engine.device_stats()) + 1


async def test_failures_are_raised_as_what_they_are(engine: EngineLike) -> None:
    with pytest.raises(UnknownHandle):
        await engine.advance("nowhere", "a", ids(3))
    with pytest.raises(NotFinite):
        await engine.advance(INITIAL, "a", (POISON,) * 9)
    with pytest.raises(RequestError) as refused:
        await finish(engine, INITIAL, None, (), Sampling())
    assert refused.value.param == "prompt"
    with pytest.raises(RequestError):
        await engine.advance(INITIAL, "a", (2**40,))
    for wrong in ((), (1,) * (CHUNK + 1), (1,) * (MAX_TRACED_TOKENS + CHUNK)):
        with pytest.raises(RequestError) as refused:
            await engine.trace_tokens(INITIAL, wrong)
        assert refused.value.param == "tokens"
    with pytest.raises(UnknownHandle):
        await engine.trace("nowhere")
    with pytest.raises(SnapshotCorrupt):
        await engine.load("a", b"nonsense")
    with pytest.raises(EngineError, match="bound already"):
        await engine.load(INITIAL, b"")
    await engine.advance(INITIAL, "a", ids(3))


async def test_calls_may_build_on_calls_that_have_not_ended(engine: EngineLike) -> None:
    tasks = [
        asyncio.create_task(engine.advance(base, result, ids(30)))
        for base, result in ((INITIAL, "a"), ("a", "b"), ("b", "c"))
    ]
    exported = asyncio.create_task(engine.export("c"))
    await asyncio.sleep(0)
    for handle in "abc":
        engine.release(handle)
    assert [done.tokens_seen for done in await asyncio.gather(*tasks)] == [30, 60, 90]
    await engine.advance(INITIAL, "d", ids(30) * 3)
    assert await exported == await engine.export("d")


async def test_closing_an_answer_early_cancels_it(engine: EngineLike) -> None:
    stream = engine.generate(INITIAL, "a", ids(3), Sampling(max_tokens=10**9, ignore_eos=True))
    async for event in stream:
        if isinstance(event, Token) and event.index == 2:
            break
    await stream.aclose()
    await until_idle(engine)
    assert (await engine.stats())["requests_cancelled_total"] == 1
    with pytest.raises(UnknownHandle):
        await engine.export("a")


async def test_cancelling_the_caller_cancels_the_request_and_its_dependents(engine: EngineLike) -> None:
    first = asyncio.create_task(finish(engine, INITIAL, "a", ids(3), Sampling(max_tokens=10**9)))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(engine.advance("a", "b", ids(3)))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(Cancelled):
        await second
    with pytest.raises(asyncio.CancelledError):
        await first
    await until_idle(engine)


async def until_idle(engine: EngineLike) -> None:
    for _ in range(200):
        if not (await engine.stats())["requests_running"]:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("requests go on")


async def test_cancel_arrives_during_a_step() -> None:
    model = FakeModel()
    engine = InlineEngine(fake_engine(model, max_requests=2))
    await engine.start()
    model.gate.clear()
    task = asyncio.create_task(engine.advance(INITIAL, "a", ids(400)))
    await until(model.entered.is_set)
    also = asyncio.create_task(engine.advance("a", "b", ids(4)))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await asyncio.gather(engine.advance("a", "c", ids(4)), _open_soon(model))
    task.cancel()
    model.gate.set()
    with pytest.raises(Cancelled):
        await also
    assert sum(sessions * chunks for sessions, chunks in model.prefills) < 400 // CHUNK
    await engine.close()


async def _open_soon(model: FakeModel) -> None:
    await asyncio.sleep(0.05)
    model.gate.set()


async def test_a_closed_engine_fails_what_was_pending() -> None:
    for engine in (InlineEngine(fake_engine()), EngineClient(command())):
        await engine.start()
        task = asyncio.create_task(finish(engine, INITIAL, None, ids(3), Sampling(max_tokens=10**9)))
        await asyncio.sleep(0.1)
        await engine.close()
        with pytest.raises(EngineUnavailable):
            await task


async def test_sigkill_amid_ingest_fails_the_calls_and_the_engine_comes_back() -> None:
    engine = EngineClient(command("--slow", "0.02"), first_delay=0.05)
    await engine.start()
    losses: list[tuple[int, bool, bool]] = []
    engine.on_lost(lambda: losses.append((engine.incarnation, engine.holds("kept"), engine.holds(INITIAL))))
    await engine.advance(INITIAL, "kept", ids(9))
    assert engine.holds("kept")
    progress: list[Progress] = []
    reading = asyncio.create_task(engine.advance(INITIAL, "a", ids(200_000), on_progress=progress.append))
    answering = asyncio.create_task(finish(engine, INITIAL, None, ids(3), Sampling(max_tokens=10**9)))
    await until(lambda: len(progress) > 3)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    for task in (reading, answering):
        with pytest.raises(EngineUnavailable, match="ended"):
            await task
    assert not engine.ready
    with pytest.raises(EngineUnavailable):
        await engine.advance(INITIAL, "b", ids(9))
    await until(lambda: engine.ready)
    assert losses == [(1, False, True)] and engine.incarnation == 2
    with pytest.raises(UnknownHandle):
        await engine.export("kept")
    assert (await engine.advance(INITIAL, "kept", ids(9))).tokens_seen == 9
    await engine.close()


async def test_a_restart_that_fails_is_tried_again(tmp_path: Path) -> None:
    once = tmp_path / "once"
    engine = EngineClient(command("--once", str(once)), first_delay=0.02, longest_delay=0.05)
    await engine.start()
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: not engine.ready)
    await asyncio.sleep(3)
    assert not engine.ready, "the process ends each time while the file is there"
    once.unlink()
    await until(lambda: engine.ready)
    assert engine.incarnation == 2
    await engine.close()


async def test_an_engine_that_cannot_start_says_why() -> None:
    with pytest.raises(ConfigError, match="no such checkpoint"):
        await EngineClient(command("--refuse")).start()
    with pytest.raises(EngineUnavailable, match="before it was ready"):
        await EngineClient(command("--crash")).start()
    with pytest.raises(EngineUnavailable, match="can't be started"):
        await EngineClient(["/nowhere/engine"]).start()
    with pytest.raises(EngineError, match="malformed"):
        await EngineClient(command("--garbage"), close_seconds=0.1).start()


def test_the_engine_does_not_outlive_its_server() -> None:
    """A server killed with SIGKILL amid a step can tell nobody; the engine sees the socket close."""
    server = textwrap.dedent(
        f"""
        import asyncio
        from mnemosyne.engine.client import EngineClient

        async def main():
            engine = EngineClient({command("--slow", "0.02")!r})
            await engine.start()
            print(engine.pid, flush=True)
            await engine.advance("initial", "a", (1,) * 200_000)

        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(0.3)
        process.kill()
    deadline = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < deadline, "the engine goes on without its server"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be noticed (Linux' state Z) doesn't."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()
