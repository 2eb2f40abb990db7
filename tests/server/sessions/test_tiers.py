"""A service whose engine has room for few states: sessions move between device, host and store, and are what
they would be anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.copies import PlainCopier
from mnemosyne.engine.errors import StatesFull
from mnemosyne.engine.holdings import tensor_bytes
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.tiers import Budgets
from mnemosyne.server.sessions.service import SessionService
from tests.server.sessions.harness import (
    TENANT,
    TEXT,
    make_engine,
    make_service,
    new_session,
    read_document,
    state,
    turn,
)

STATES = 8
SESSIONS = 10


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[DirectoryStore]:
    store = DirectoryStore(tmp_path / "elsewhere")
    yield store
    store.close()


@pytest.fixture
async def tight(directory: DirectoryStore) -> AsyncIterator[SessionService]:
    nbytes = tensor_bytes(make_engine()._engine._desk._slots["initial"].state.tensors)  # type: ignore[union-attr]
    engine = make_engine(budgets=Budgets(device=4 * nbytes, host=4 * nbytes), copier=PlainCopier())
    await engine.start()
    room = engine.info.room_bytes
    assert room == STATES * nbytes
    service = make_service(directory, engine, resident_bytes=room * 3 // 4)
    await service.start([TENANT])
    yield service
    await service.drain()
    await engine.close()


async def until_there_is_room(service: SessionService, session_id: str, text: str) -> int:
    """How often the turn was refused before it was answered."""
    for refused in range(200):
        try:
            await turn(service, session_id, text)
            return refused
        except StatesFull:
            await asyncio.sleep(0.02)
    raise AssertionError("refused for good")


async def test_more_sessions_than_there_is_room_for(
    tight: SessionService, elsewhere: DirectoryStore, engine: InlineEngine
) -> None:
    roomy = make_service(elsewhere, engine)
    sessions = [await new_session(tight) for _ in range(SESSIONS)]
    same = [await new_session(roomy) for _ in range(SESSIONS)]
    for service, ids in ((tight, sessions), (roomy, same)):
        documents = (read_document(service, each, f"{i}. {TEXT}") for i, each in enumerate(ids))
        assert all(read.status == "absorbed" for read in await asyncio.gather(*documents))
        for _ in range(2):
            await asyncio.gather(*(until_there_is_room(service, each, "Each mill") for each in ids))
    for one, other in zip(sessions, same, strict=True):
        assert await state(tight, one) == await state(roomy, other)
    stats = await tight._core.engine.stats()
    assert stats["states_moved_out_total"] > 0 and stats["states_moved_in_total"] > 0
    assert tight._core.recovery.restores > 0, "and the store is the third tier"
    assert stats["device_states"] + stats["host_states"] <= STATES
    await roomy.drain()
