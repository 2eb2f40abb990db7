"""One writer: two services on one store take turns, and a stale one is refused."""

from __future__ import annotations

import asyncio

import pytest

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import LeaseLost, SessionBusy
from mnemosyne.engine.inline import InlineEngine
from tests.server.sessions.harness import (
    TENANT,
    TEXT,
    answer,
    ask,
    key,
    make_service,
    new_session,
    read_document,
    state,
    turn,
    until,
    until_ended,
)


async def test_two_servers_take_turns(any_store: SessionStore, engine: InlineEngine) -> None:
    one, two = make_service(any_store, engine, "one"), make_service(any_store, engine, "two")
    session_id = await new_session(one)
    await turn(one, session_id, "The first keeper is called Ann.", idempotency=key("a"))
    told = await turn(two, session_id, "Her name?")
    assert told.session is not None and told.session.version == 3
    again = await turn(two, session_id, "The first keeper is called Ann.", idempotency=key("a"))
    assert again.repeated and again.session is not None and again.session.version == 2
    told = await turn(one, session_id, "And the second keeper's?", if_match=3)
    assert told.session is not None and told.session.version == 4
    assert await state(one, session_id) == await state(two, session_id)
    await read_document(one, session_id, TEXT)
    assert (await two.get(TENANT, session_id)).version == 5


async def test_while_one_writes_the_other_reads(any_store: SessionStore, engine: InlineEngine) -> None:
    one, two = make_service(any_store, engine, "one"), make_service(any_store, engine, "two")
    session_id = await new_session(one)
    await turn(one, session_id, "The first keeper is called Ann.")
    stream = await one.turn(TENANT, session_id, ask("Tell all.", 5000))
    await anext(aiter(stream))
    with pytest.raises(SessionBusy) as caught:
        await two.turn(TENANT, session_id, ask("Her name?"))
    assert "retry_after" in caught.value.attributes
    assert (await turn(two, session_id, "Her name?", learn=False)).session is not None
    await stream.aclose()
    assert (await turn(two, session_id, "Her name?")).session is not None


async def test_a_server_that_slept_too_long_is_refused(any_store: SessionStore, engine: InlineEngine) -> None:
    one = make_service(any_store, engine, "one", lease_seconds=30.0)
    two = make_service(any_store, engine, "two")
    session_id = await new_session(one)
    await turn(one, session_id, "The first keeper is called Ann.")
    stream = await one.turn(TENANT, session_id, ask("Her name?", 60))
    await anext(aiter(stream))
    # As if its lease had run out while it slept: another owner comes, writes, and goes.
    held = one._core.leases._entries[session_id].held
    assert held is not None
    any_store.release(held.lease)
    told = await turn(two, session_id, "Something else.")
    with pytest.raises(LeaseLost):
        await answer(stream)
    assert told.session is not None
    assert (await one.get(TENANT, session_id)).version == 3
    assert await state(one, session_id) == await state(two, session_id)
    assert one.stats()["lease_lost_total"] >= 1
    assert (await turn(one, session_id, "Now?")).session is not None


async def test_a_document_of_a_server_that_slept_too_long_is_read_once(
    any_store: SessionStore, engine: InlineEngine
) -> None:
    one, two = make_service(any_store, engine, "one"), make_service(any_store, engine, "two")
    session_id, other = await new_session(one), await new_session(one)
    made = await one.create_document(TENANT, session_id, name="long", text=TEXT * 60)
    live = one._core.registry._lives[session_id]
    await until(lambda: live.session.document(made.id).absorbed_tokens > 0)
    held = one._core.leases._entries[session_id].held
    assert held is not None
    any_store.release(held.lease)
    assert (await until_ended(two, session_id, made.id)).status == "absorbed"
    await until(lambda: not two._core.leases.holds(session_id))
    # What the first had in memory moves nothing any more, and the session as it looks it up anew does.
    with pytest.raises(LeaseLost):
        async with one._core.writing(live):
            pass
    await until_ended(one, session_id, made.id)
    await turn(one, session_id, "Now?")
    again = await two.create_document(TENANT, other, name="long", text=TEXT * 60)
    await until_ended(two, other, again.id)
    await turn(two, other, "Now?")
    assert await state(one, session_id) == await state(two, other)
    assert live.absorber is None


async def test_a_lease_is_kept_while_it_is_used(any_store: SessionStore, engine: InlineEngine) -> None:
    one = make_service(any_store, engine, "one", lease_seconds=1.0)
    two = make_service(any_store, engine, "two")
    session_id = await new_session(one)
    stream = await one.turn(TENANT, session_id, ask("Tell all.", 100_000))
    await anext(aiter(stream))
    await asyncio.sleep(2.2)
    with pytest.raises(SessionBusy):
        await two.turn(TENANT, session_id, ask("Her name?"))
    await stream.aclose()


async def test_another_server_reads_what_a_dead_one_left(
    any_store: SessionStore, engine: InlineEngine
) -> None:
    one = make_service(any_store, engine, "one", lease_seconds=0.3)
    two = make_service(any_store, engine, "two", lease_seconds=0.3)
    session_id, other = await new_session(one), await new_session(one)
    made = await one.create_document(TENANT, session_id, name="long", text=TEXT * 60)
    await asyncio.sleep(0.1)
    live = one._core.registry._lives[session_id]
    one._core.draining = True  # it reads no further
    stopped = one._absorber.stopped(live)
    await stopped.__aenter__()
    assert (await until_ended(two, session_id, made.id)).status == "absorbed"
    again = await two.create_document(TENANT, other, name="long", text=TEXT * 60)
    await until_ended(two, other, again.id)
    assert await state(two, session_id) == await state(two, other)


async def test_what_was_written_before_the_lease_is_known_under_it(
    any_store: SessionStore, engine: InlineEngine
) -> None:
    one, two = make_service(any_store, engine, "one"), make_service(any_store, engine, "two")
    session_id = await new_session(one)
    found = await two._core.registry.get(TENANT, session_id)
    await turn(one, session_id, "In between.")
    assert found.session.newest.number == 1
    async with two._core.writing(found):
        assert found.session.newest.number == 2
