"""A store that goes away and comes back: what fails fails whole, and what stood stands."""

from __future__ import annotations

import asyncio

import pytest

from mnemosyne.checkpoints.redis_store import RedisStore
from mnemosyne.engine.errors import SessionBusy, StoreUnavailable
from mnemosyne.engine.inline import InlineEngine
from tests.conftest import RedisServer
from tests.server.sessions.harness import (
    TENANT,
    TEXT,
    answer,
    ask,
    key,
    make_service,
    new_session,
    state,
    turn,
    until,
    until_ended,
)


async def test_a_turn_fails_whole_when_redis_goes_and_works_when_it_is_back(
    redis_server: RedisServer, engine: InlineEngine
) -> None:
    service = make_service(RedisStore(redis_server.url, timeout=2.0), engine)
    session_id = await new_session(service)
    await turn(service, session_id, "The first keeper is called Ann.")
    before = await state(service, session_id)
    stream = await service.turn(TENANT, session_id, ask("Her name?", 40, idempotency=key("a")))
    await anext(aiter(stream))
    redis_server.kill()
    with pytest.raises(StoreUnavailable):
        await answer(stream)
    with pytest.raises(StoreUnavailable):
        await service.turn(TENANT, session_id, ask("Her name?"))
    with pytest.raises(StoreUnavailable):
        await service.check()
    redis_server.start()
    await service.check()
    assert (await service.get(TENANT, session_id)).version == 2
    assert await state(service, session_id) == before

    async def again() -> bool:
        try:
            told = await turn(service, session_id, "Her name?", max_tokens=40, idempotency=key("a"))
        except SessionBusy:  # the lease that couldn't be let go runs out
            return False
        return told.session is not None and told.session.version == 3 and not told.repeated

    await until(again)
    await service.drain()


async def test_reading_goes_on_when_redis_is_back(redis_server: RedisServer, engine: InlineEngine) -> None:
    service = make_service(RedisStore(redis_server.url, timeout=2.0), engine)
    session_id, undisturbed = await new_session(service), await new_session(service)
    made = await service.create_document(TENANT, session_id, name="long", text=TEXT * 60)
    live = service._core.registry._lives[session_id]
    await until(lambda: live.session.document(made.id).absorbed_tokens > 0)
    redis_server.kill()
    failed = []
    async for event in service._core.registry._lives[session_id].events.follow(0):
        if event.kind == "error":
            failed.append(event.data["code"])
            break
    assert failed == ["StoreUnavailable"]
    redis_server.start()
    assert (await until_ended(service, session_id, made.id)).status == "absorbed"
    other = await service.create_document(TENANT, undisturbed, name="long", text=TEXT * 60)
    await until_ended(service, undisturbed, other.id)
    assert await state(service, session_id) == await state(service, undisturbed)
    await service.drain()


async def test_what_is_unread_is_taken_up_though_redis_came_after_the_server(
    redis_server: RedisServer, engine: InlineEngine
) -> None:
    one = make_service(RedisStore(redis_server.url, timeout=2.0), engine)
    session_id = await new_session(one)
    live = await one._core.registry.get(TENANT, session_id)
    async with one._absorber.stopped(live):
        await one.create_document(TENANT, session_id, name="unread", text=TEXT)
        one._core.draining = True
    redis_server.kill()
    two = make_service(RedisStore(redis_server.url, timeout=2.0), engine)
    await two.start([TENANT])
    await asyncio.sleep(0.1)
    redis_server.start()
    await until(lambda: two.stats()["tokens_absorbed_total"] > 0)  # nobody has asked for it
    await two.drain()
