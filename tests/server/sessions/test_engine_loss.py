"""An engine that is killed: what ran fails or goes on later, and every session comes back by itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.errors import EngineUnavailable
from mnemosyne.engine.messages import Sampling
from mnemosyne.server.sessions.views import TurnRequest
from tests.server.sessions.harness import (
    TENANT,
    answer,
    make_service,
    new_session,
    state,
    until,
    until_ended,
)

FAKE = Path(__file__).parents[2] / "engine" / "fake_process.py"


@pytest.fixture
async def process() -> AsyncIterator[EngineClient]:
    """A real engine process, on a model without mathematics."""
    client = EngineClient([sys.executable, str(FAKE), "--slow", "0.002"], first_delay=0.05)
    await client.start()
    yield client
    await client.close()


def turn(*prompt: int, max_tokens: int = 3) -> TurnRequest:
    return TurnRequest(prompt=prompt, sampling=Sampling(max_tokens=max_tokens, temperature=0.0))


async def test_sessions_come_back_after_the_engine_was_killed(
    directory: DirectoryStore, process: EngineClient
) -> None:
    service = make_service(directory, process)
    session_id, other = await new_session(service), await new_session(service)
    for each in (session_id, other):
        await answer(await service.turn(TENANT, each, turn(1, 2, 3, 4, 5)))
    before = await state(service, session_id)
    ids = tuple(i % 30 for i in range(9000))
    made = await service.create_document(TENANT, other, name="d", tokens=ids)
    stream = await service.turn(TENANT, session_id, turn(6, max_tokens=10**6))
    await anext(aiter(stream))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailable):
        await answer(stream)
    await until(lambda: process.ready and process.incarnation == 2)
    assert (await service.get(TENANT, session_id)).version == 2
    assert await state(service, session_id) == before
    told = await answer(await service.turn(TENANT, session_id, turn(6)))
    assert told.session is not None and told.session.version == 3
    assert (await until_ended(service, other, made.id)).status == "absorbed"
    fresh = await new_session(service)
    await answer(await service.turn(TENANT, fresh, turn(1, 2, 3, 4, 5)))
    again = await service.create_document(TENANT, fresh, name="d", tokens=ids)
    await until_ended(service, fresh, again.id)
    assert await state(service, fresh) == await state(service, other)
    await service.drain()
