"""A number that isn't finite: it stops what made it, and the session's last good version is intact."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import NotFinite
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.messages import EngineInfo, Sampling
from mnemosyne.engine.scheduler import Limits
from mnemosyne.server.sessions.views import TurnRequest
from tests.engine.fakes import BLIND, POISON, FakeModel, dump, load
from tests.server.sessions.harness import TENANT, answer, make_service, new_session, state, until_ended


@pytest.fixture
async def breakable() -> AsyncIterator[InlineEngine]:
    """An engine whose model breaks on command."""
    info = EngineInfo(
        model_fingerprint="m",
        numerics_fingerprint="n",
        numerics={},
        config={},
        device="cpu",
        dtype="float32",
        parameters=0,
        state_bytes=32,
        max_queued_tokens=0,
    )
    engine = InlineEngine(Engine(FakeModel(), info, Limits(), dump, load))
    await engine.start()
    yield engine
    await engine.close()


def turn(*prompt: int) -> TurnRequest:
    return TurnRequest(prompt=prompt, sampling=Sampling(max_tokens=3, temperature=0.0))


async def test_the_last_good_version_stands(directory: DirectoryStore, breakable: InlineEngine) -> None:
    service = make_service(directory, breakable)
    session_id = await new_session(service)
    await answer(await service.turn(TENANT, session_id, turn(1, 2, 3)))
    before = await state(service, session_id)
    made = await service.create_document(
        TENANT, session_id, name="d", tokens=(5, 6, 7, 8, POISON, 9, 10, 11, 12)
    )
    read = await until_ended(service, session_id, made.id)
    assert read.status == "rejected" and read.error is not None and read.error["code"] == "NotFinite"
    assert await state(service, session_id) == before
    assert (await service.get(TENANT, session_id)).health == "not_finite"
    with pytest.raises(NotFinite):
        await answer(await service.turn(TENANT, session_id, turn(4, BLIND)))
    assert await state(service, session_id) == before
    told = await answer(await service.turn(TENANT, session_id, turn(4)))
    assert told.session is not None and told.session.version == 3
    assert (await service.get(TENANT, session_id)).health == "ok"
    await service.drain()
