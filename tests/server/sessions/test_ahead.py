"""The engine has the next piece of a document before it has read this one; nothing is left of what fails."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.advance import advance
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import QueueFull
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.messages import Advanced, Progress
from mnemosyne.engine.scheduler import Limits
from mnemosyne.server.sessions import reader
from mnemosyne.server.sessions.service import SessionService
from tests.engine.fakes import CHUNK, INFO, POISON, FakeModel, dump, load
from tests.server.sessions.harness import TENANT, make_service, new_session, until, until_ended

PIECE = 64
TOKENS = tuple(random.Random(3).randrange(40) for _ in range(PIECE * 12 + 5))


class Watched(InlineEngine):
    """Counts the advances that it has and hasn't answered, and fails some of them."""

    def __init__(self, model: FakeModel) -> None:
        info = dataclasses.replace(INFO, state_bytes=32)
        super().__init__(Engine(model, info, Limits(max_queued_tokens=PIECE * 8), dump, load))
        self.under_way = self.sent = 0
        self.seen: list[int] = []
        """How many were under way as each was sent."""
        self.fails: set[int] = set()

    async def advance(
        self,
        base: str,
        result: str,
        tokens: tuple[int, ...],
        kinds: bytes | None = None,
        tenant: str = "",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Advanced:
        self.sent += 1
        self.under_way += 1
        self.seen.append(self.under_way)
        try:
            if self.sent in self.fails:
                raise QueueFull("on command")
            return await super().advance(base, result, tokens, kinds, tenant, on_progress)
        finally:
            self.under_way -= 1


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
async def engine(model: FakeModel) -> AsyncIterator[Watched]:
    made = Watched(model)
    await made.start()
    yield made
    model.gate.set()
    await made.close()


@pytest.fixture
async def service(
    directory: DirectoryStore, engine: Watched, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SessionService]:
    monkeypatch.setattr(reader, "READ", PIECE * 4)  # ids come in no smaller blocks
    made = make_service(directory, engine)
    await made.start([TENANT])
    yield made
    await made.drain()


async def is_read(service: SessionService, engine: Watched, tokens: tuple[int, ...] = TOKENS) -> None:
    session_id = await new_session(service)
    made = await service.create_document(TENANT, session_id, name="d", tokens=tokens)
    assert (await until_ended(service, session_id, made.id)).status == "absorbed"
    fresh = FakeModel()
    [resident] = [r for r in service._core.residents.all() if session_id in r.claims]
    expected = dump(advance(fresh, fresh.initial_state(), tokens, chunk=CHUNK))
    assert await engine.export(resident.handle) == expected


async def test_the_next_piece_is_there_while_one_is_read(
    service: SessionService, engine: Watched, model: FakeModel
) -> None:
    session_id = await new_session(service)
    model.gate.clear()
    made = await service.create_document(TENANT, session_id, name="d", tokens=TOKENS)
    await until(lambda: engine.under_way == 2 and model.entered.is_set())
    model.gate.set()
    await until_ended(service, session_id, made.id)
    assert engine.seen[:2] == [1, 2] and max(engine.seen) == 2
    await is_read(service, engine)


async def test_a_piece_that_is_refused_is_read_later_and_what_came_before_is_kept(
    service: SessionService, engine: Watched
) -> None:
    engine.fails = {2, 6, 7}
    await is_read(service, engine)
    assert (await engine.stats())["handles"] == 2


async def test_however_many_read_the_queue_has_room_for_their_pieces(
    service: SessionService, engine: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "READ", 16)
    await asyncio.gather(*(is_read(service, engine) for _ in range(12)))
    assert (await engine.stats())["requests_rejected_total"] == 0


async def test_a_failure_takes_the_pieces_behind_it_along(
    service: SessionService, engine: Watched, model: FakeModel
) -> None:
    session_id = await new_session(service)
    bad = (*TOKENS[: PIECE * 2 + 9], POISON, *TOKENS)
    made = await service.create_document(TENANT, session_id, name="d", tokens=bad)
    read = await until_ended(service, session_id, made.id)
    assert read.status == "rejected" and read.error is not None and read.error["code"] == "NotFinite"
    await until(lambda: engine.under_way == 0)
    assert (await engine.stats())["handles"] == 1
    await is_read(service, engine)


async def test_cancelled_with_two_under_way_it_leaves_no_handle(
    service: SessionService, engine: Watched, model: FakeModel
) -> None:
    session_id = await new_session(service)
    model.gate.clear()
    made = await service.create_document(TENANT, session_id, name="d", tokens=TOKENS)
    await until(lambda: engine.under_way == 2)
    cancelling = asyncio.create_task(service.cancel_document(TENANT, session_id, made.id))
    await asyncio.sleep(0.05)
    model.gate.set()
    assert (await cancelling).status == "cancelled"
    assert engine.under_way == 0
    await until(lambda: not service._absorber.active)
    assert (await engine.stats())["handles"] == 1
