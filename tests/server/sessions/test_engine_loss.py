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


async def test_a_document_that_ends_the_engine_is_refused_and_takes_no_other_with_it(
    directory: DirectoryStore,
) -> None:
    engine = EngineClient([sys.executable, str(FAKE), "--slow", "0.002", "--deadly", "29"], first_delay=0.05)
    await engine.start()
    service = make_service(directory, engine)
    ids = tuple(i % 28 for i in range(9000))
    documents = [(*ids[:3000], 29, *ids)] + 4 * [ids]  # so early that no other has read a piece by then
    sessions = [await new_session(service) for _ in documents]
    made = [
        await service.create_document(TENANT, session, name="d", tokens=tokens)
        for session, tokens in zip(sessions, documents, strict=True)
    ]
    ended = [
        await until_ended(service, session, document.id)
        for session, document in zip(sessions, made, strict=True)
    ]
    assert [document.status for document in ended] == ["rejected", *4 * ["absorbed"]]
    error = ended[0].error
    assert error is not None and error["code"] == "DocumentRejected"
    assert "the engine ended 3 times while it read on at byte" in error["message"]
    assert engine.incarnation == 1 + 3
    told = await answer(await service.turn(TENANT, sessions[0], turn(6)))
    assert told.tokens, "the session goes on without it"
    await service.drain()
    await engine.close()
