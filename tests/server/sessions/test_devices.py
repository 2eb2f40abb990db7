"""Two engine processes behind one server: sessions on both, one that moves, and what a killed engine takes.

Every state and answer is compared with those of one engine that was alone and never died.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.errors import Cancelled, ConfigError
from mnemosyne.engine.fleet import Fleet
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.messages import INITIAL, Sampling
from mnemosyne.server import engine_main, parts
from mnemosyne.server.sessions.service import SessionService
from mnemosyne.server.settings import Settings
from tests.server.sessions.harness import (
    TENANT,
    TEXT,
    ask,
    make_service,
    new_session,
    state,
    turn,
    until,
    until_ended,
)
from tests.server.test_engine_main import make_checkpoint

SHORT = TEXT * 3
LONG = "".join(f"{number}. {TEXT}" for number in range(40))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    path = make_checkpoint(tmp_path / "checkpoint").path
    # A piece of a document is an eighth of what an engine queues.
    limits = {"max_queued_tokens": 8192, "max_request_tokens": 4096}
    return Settings.load(
        checkpoint=path, data_dir=tmp_path / "data", device="cpu,cpu", dtype="float32", threads=1, **limits
    )


@pytest.fixture
async def fleet(settings: Settings) -> AsyncIterator[Fleet]:
    """Its clock stands still, so that nothing is left of a load that has ended: sessions are placed by how
    many there are, and none moves for balance's sake."""
    engines = parts.make_engine(settings)
    assert isinstance(engines, Fleet)
    made = Fleet(engines.engines, clock=lambda: 0.0)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def alone(settings: Settings, tmp_path: Path) -> AsyncIterator[SessionService]:
    """A service whose one engine is never disturbed."""
    engine = InlineEngine(engine_main.make_engine(settings.checkpoint, precision="float32", threads=1))
    await engine.start()
    store = DirectoryStore(tmp_path / "alone")
    service = make_service(store, engine)
    yield service
    await service.drain()
    await engine.close()
    store.close()


def handle(service: SessionService, session_id: str) -> str:
    """Of the session's newest state."""
    residents = [r for r in service._core.residents.all() if session_id in r.claims]
    return max(residents, key=lambda r: r.point.tokens).handle if residents else INITIAL


def device(service: SessionService, fleet: Fleet, session_id: str) -> str | None:
    """Where that is, None while it isn't held."""
    return fleet.device_of(handle(service, session_id))


def process(fleet: Fleet, name: str) -> EngineClient:
    [client] = [member.engine for member in fleet._members if member.name == name]
    assert isinstance(client, EngineClient)
    return client


async def read(service: SessionService, session_id: str, text: str) -> str:
    """Upload a document, which is then being read."""
    made = await service.create_document(TENANT, session_id, name="d")
    await service.append_document(TENANT, session_id, made.id, offset=0, data=text.encode(), complete=True)
    return made.id


def wait_for(gate: Path, client: EngineClient) -> None:
    """From now on it starts its process again only once there is such a file."""
    loop = 'until [ -e "$0" ]; do sleep 0.05; done; exec "$@"'
    client._command = ("sh", "-c", loop, str(gate), *client._command)


async def test_a_session_moves_and_an_engine_is_killed(
    directory: DirectoryStore, fleet: Fleet, alone: SessionService, tmp_path: Path
) -> None:
    service = make_service(directory, fleet)
    ids = [await new_session(service) for _ in range(4)]
    for each in ids:
        assert (await until_ended(service, each, await read(service, each, SHORT))).status == "absorbed"
    assert [device(service, fleet, each) for each in ids] == ["cpu#0", "cpu#1"] * 2
    reads, lasts, moves, answers = range(4)

    # The queue is full of tokens that wait for an endless answer: the turn goes on where there is room.
    endless = fleet.generate(handle(service, ids[reads]), "endless", (7,), Sampling(max_tokens=10**9))
    await anext(endless)
    waiting = asyncio.create_task(fleet.advance("endless", "after it", (7,) * 8190))
    await asyncio.sleep(0)
    moved = await turn(service, ids[moves], "The river runs")
    assert device(service, fleet, ids[moves]) == "cpu#1" and not waiting.done()
    await endless.aclose()
    with pytest.raises(Cancelled):
        await waiting

    # One reads on the engine that is killed; on the other one reads and one answers.
    stream = await service.turn(TENANT, ids[answers], ask("The river", max_tokens=60))
    first = await anext(aiter(stream))
    reading = [(ids[i], await read(service, ids[i], LONG)) for i in (lasts, reads)]

    async def begun() -> bool:
        return (await service.document(TENANT, *reading[1])).tokens_absorbed > 0

    await until(begun)
    killed = process(fleet, "cpu#0")
    wait_for(tmp_path / "gate", killed)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    await until(lambda: device(service, fleet, ids[reads]) == "cpu#1")
    assert not killed.ready, "it came back on the one that was left"
    (tmp_path / "gate").touch()
    await service.check()
    rest = [item async for item in stream]
    for document in reading:
        assert (await until_ended(service, *document)).status == "absorbed"
    await until(lambda: killed.ready)
    stats = await fleet.device_stats()
    assert fleet.incarnation == 2
    assert [stats[f"cpu#{i}"]["restarts_total"] for i in range(2)] == [1, 0]
    said = [await turn(service, each, "Each mill") for each in ids]

    never = [await new_session(alone) for _ in ids]
    for each in never:
        await until_ended(alone, each, await read(alone, each, SHORT))
    assert moved.text == (await turn(alone, never[moves], "The river runs")).text
    answered = await turn(alone, never[answers], "The river", max_tokens=60)
    assert rest[-1].text == answered.text and answered.text.startswith(first.text)
    for i in (reads, lasts):
        await until_ended(alone, never[i], await read(alone, never[i], LONG))
    for here, there, answer in zip(ids, never, said, strict=True):
        assert answer.text == (await turn(alone, there, "Each mill")).text
        assert await state(service, here) == await state(alone, there)
    await service.drain()


def test_a_list_of_devices_is_an_engine_each(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts.names_of(["cuda:0", "cuda:1"]) == ["cuda:0", "cuda:1"]
    assert parts.names_of(["cpu", "cuda:0", "cpu"]) == ["cpu#0", "cuda:0", "cpu#1"]
    assert isinstance(parts.make_engine(settings.model_copy(update={"device": "cuda:1"})), EngineClient)
    every = settings.model_copy(update={"device": "cuda:all"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no CUDA device"):
        parts.make_engine(every)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert isinstance(parts.make_engine(every), Fleet)
