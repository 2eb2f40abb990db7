"""Documents: however the bytes came, whenever the server died, the session has read the same text once."""

from __future__ import annotations

import asyncio
import hashlib
import random

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.errors import (
    DocumentNotFound,
    DocumentRejected,
    OffsetMismatch,
    RequestError,
    SessionBusy,
)
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.server.sessions.service import SessionService
from tests.server.sessions.harness import (
    TENANT,
    TEXT,
    ask,
    key,
    make_service,
    new_session,
    read_document,
    state,
    tokenizer,
    turn,
    until,
    until_ended,
)

LONG = TEXT * 60
"""Some twelve thousand tokens: several pieces."""


async def test_any_split_of_the_bytes_is_the_same_document(service: SessionService) -> None:
    data = (TEXT * 12 + "x" * 9000 + "漢字" * 5000).encode()
    whole = await new_session(service)
    read = await read_document(service, whole, data)
    assert (read.status, read.bytes_absorbed, read.version) == ("absorbed", len(data), 2)
    expected = await state(service, whole)
    rng = random.Random(5)
    for longest in (700, 40_000):
        session_id, offset = await new_session(service), 0
        made = await service.create_document(TENANT, session_id, name="in parts", length=len(data))
        while offset < len(data):
            part = data[offset : offset + rng.randint(1, longest)]
            info = await service.append_document(TENANT, session_id, made.id, offset=offset, data=part)
            offset = info.bytes_received
        await service.append_document(TENANT, session_id, made.id, offset=offset, data=b"", complete=True)
        await until_ended(service, session_id, made.id)
        assert await state(service, session_id) == expected
    said = await service.transcript(TENANT, whole)
    assert [entry["kind"] for entry in said] == ["document"]
    assert said[0]["text"].encode() == data


async def test_text_and_tokens_are_documents_at_once(service: SessionService) -> None:
    uploaded, as_text, as_tokens = [await new_session(service) for _ in range(3)]
    await read_document(service, uploaded, TEXT)
    made = await service.create_document(TENANT, as_text, name="t", text=TEXT, idempotency=key("d"))
    again = await service.create_document(TENANT, as_text, name="t", text=TEXT, idempotency=key("d"))
    assert again == made and made.status == "queued"
    ids = tokenizer().encode_document(TEXT)
    other = await service.create_document(TENANT, as_tokens, name="t", tokens=ids)
    await until_ended(service, as_text, made.id)
    await until_ended(service, as_tokens, other.id)
    assert await state(service, as_text) == await state(service, uploaded) == await state(service, as_tokens)
    assert len(await service.documents(TENANT, as_text)) == 1


@pytest.mark.parametrize(
    ("fields", "parts", "offset"),
    [
        ({}, [b"good start \xff and more"], 11),
        ({}, ["a split character: ö".encode()[:-1], b"x"], 19),
        ({}, ["ends in a character ö".encode()[:-1]], 20),
        ({"length": 5}, [b"four"], None),
        ({"length": 5}, [b"sixsix"], None),
        ({"sha256": "0" * 64}, [b"some text"], None),
        ({}, [b""], None),
    ],
)
async def test_a_wrong_document_is_rejected_and_the_session_is_what_it_was(
    service: SessionService, fields: dict[str, object], parts: list[bytes], offset: int | None
) -> None:
    session_id = await new_session(service)
    await turn(service, session_id, "The first keeper is called Ann.")
    before = await state(service, session_id)
    made = await service.create_document(TENANT, session_id, name="wrong", **fields)  # type: ignore[arg-type]
    with pytest.raises(DocumentRejected) as caught:
        at = 0
        for i, part in enumerate(parts):
            info = await service.append_document(
                TENANT, session_id, made.id, offset=at, data=part, complete=i == len(parts) - 1
            )
            at = info.bytes_received
    assert caught.value.attributes.get("offset") == offset
    info = await service.document(TENANT, session_id, made.id)
    assert info.status == "rejected" and info.error is not None and info.error["code"] == "DocumentRejected"
    assert await state(service, session_id) == before
    assert (await service.get(TENANT, session_id)).version == 2
    assert (await read_document(service, session_id, TEXT)).version == 3


async def test_an_upload_goes_on_where_it_was(
    service: SessionService, directory: DirectoryStore, engine: InlineEngine
) -> None:
    session_id, data = await new_session(service), TEXT.encode()
    sha = hashlib.sha256(data).hexdigest()
    made = await service.create_document(TENANT, session_id, name="d", length=len(data), sha256=sha)
    await service.append_document(TENANT, session_id, made.id, offset=0, data=data[:50])
    for wrong in (0, 49, 51):
        with pytest.raises(OffsetMismatch) as caught:
            await service.append_document(TENANT, session_id, made.id, offset=wrong, data=data[wrong:])
        assert caught.value.attributes["offset"] == 50
    after_crash = make_service(directory, engine)
    await after_crash.start([TENANT])
    assert (await after_crash.document(TENANT, session_id, made.id)).bytes_received == 50
    await after_crash.append_document(TENANT, session_id, made.id, offset=50, data=data[50:], complete=True)
    repeated = await after_crash.append_document(
        TENANT, session_id, made.id, offset=len(data), data=b"", complete=True
    )
    assert repeated.bytes_received == len(data)
    assert (await until_ended(after_crash, session_id, made.id)).status == "absorbed"
    await after_crash.drain()


async def test_documents_are_read_in_order_and_turns_wait_or_read(service: SessionService) -> None:
    session_id = await new_session(service)
    first = await service.create_document(TENANT, session_id, name="first")
    second = await service.create_document(TENANT, session_id, name="second", text=TEXT)
    with pytest.raises(SessionBusy) as caught:
        await service.turn(TENANT, session_id, ask("Hello"))
    assert caught.value.attributes["document"] == second.id
    await asyncio.sleep(0.05)
    assert (await service.document(TENANT, session_id, second.id)).status == "queued"
    await service.append_document(TENANT, session_id, first.id, offset=0, data=LONG.encode(), complete=True)
    seen = set()
    while (await service.document(TENANT, session_id, first.id)).status != "absorbed":
        dry = await turn(service, session_id, "Hello", max_tokens=2, learn=False)
        assert dry.session is not None and dry.session.version == 1
        seen.add(dry.session.tokens_seen)
    assert len(seen) > 2, "the answers come from the pieces that were read by then"
    assert (await until_ended(service, session_id, second.id)).version == 3
    assert [d.version for d in await service.documents(TENANT, session_id)] == [2, 3]
    one_by_one = await new_session(service)
    await read_document(service, one_by_one, LONG)
    await read_document(service, one_by_one, TEXT)
    assert await state(service, one_by_one) == await state(service, session_id)


async def test_a_document_can_be_cancelled_while_it_is_read(service: SessionService) -> None:
    session_id = await new_session(service)
    await turn(service, session_id, "The first keeper is called Ann.")
    before = await state(service, session_id)
    made = await service.create_document(TENANT, session_id, name="long", text=LONG)

    async def begun() -> bool:
        return (await service.document(TENANT, session_id, made.id)).tokens_absorbed > 0

    await until(begun)
    assert (await service.cancel_document(TENANT, session_id, made.id)).status == "cancelled"
    assert await state(service, session_id) == before
    assert (await turn(service, session_id, "Her name?")).session is not None
    with pytest.raises(DocumentNotFound):
        await service.append_document(TENANT, session_id, made.id, offset=0, data=b"x")
    read = await read_document(service, session_id, TEXT)
    with pytest.raises(RequestError):
        await service.cancel_document(TENANT, session_id, read.id)


async def test_all_documents_are_cancelled_at_once_and_the_next_is_read(service: SessionService) -> None:
    session_id = await new_session(service)
    for _ in range(3):
        await service.create_document(TENANT, session_id, name="long", text=LONG)
    assert await service.cancel(TENANT, session_id) == 3
    assert (await read_document(service, session_id, TEXT)).status == "absorbed"


async def test_what_was_cancelled_is_not_read_because_somebody_looks(service: SessionService) -> None:
    session_id, untouched = await new_session(service), await new_session(service)
    made = await service.create_document(TENANT, session_id, name="long", text=LONG)
    cancelling = asyncio.create_task(service.cancel_document(TENANT, session_id, made.id))
    while not cancelling.done():  # each look-up is also a reason to go on reading
        await service.document(TENANT, session_id, made.id)
        await asyncio.sleep(0)
    assert (await cancelling).status == "cancelled"
    await asyncio.sleep(0.3)  # what was wrongly begun would be read by now
    assert (await service.document(TENANT, session_id, made.id)).status == "cancelled"
    assert await state(service, session_id) == await state(service, untouched)


async def test_reading_goes_on_after_a_crash(
    service: SessionService, directory: DirectoryStore, engine: InlineEngine
) -> None:
    session_id = await new_session(service)
    made = await service.create_document(TENANT, session_id, name="long", text=LONG)

    async def begun() -> bool:
        return (await service.document(TENANT, session_id, made.id)).tokens_absorbed > 0

    await until(begun)
    # What a crash leaves: the journal as it is, nobody who goes on by himself.
    live = service._core.registry._lives[session_id]
    stopped = service._absorber.stopped(live)
    await stopped.__aenter__()
    partly = live.session.document(made.id).absorbed_tokens
    after_crash = make_service(directory, engine)
    await after_crash.start([TENANT])
    read = await until_ended(after_crash, session_id, made.id)
    assert 0 < partly < read.tokens_absorbed and read.status == "absorbed"
    fresh = await new_session(after_crash)
    await read_document(after_crash, fresh, LONG)
    assert await state(after_crash, fresh) == await state(after_crash, session_id)
    await after_crash.drain()


async def test_progress_and_surprise_are_told(service: SessionService) -> None:
    session_id = await new_session(service)
    told = []

    async def listen() -> None:
        async for event in service.events(TENANT, session_id, last_event_id=0):
            told.append(event)
            if event.kind == "version":
                return

    listening = asyncio.create_task(listen())
    await read_document(service, session_id, LONG)
    await asyncio.wait_for(listening, 10)
    progress = [event.data for event in told if event.kind == "progress"]
    assert [p["tokens_absorbed"] for p in progress] == sorted(p["tokens_absorbed"] for p in progress)
    assert progress[-1]["bytes_absorbed"] == progress[-1]["bytes_total"] == len(LONG.encode())
    assert progress[-1]["seconds_left"] == 0 and progress[0]["seconds_left"] > 0
    assert all(p["surprise"] > 0 for p in progress)
    assert any(event.kind == "surprise" and event.data["surprise"] > 0 for event in told)
    assert [event.id for event in told] == sorted({event.id for event in told})
    middle = told[len(told) // 2].id
    missed = []
    async for event in service.events(TENANT, session_id, last_event_id=middle):
        missed.append(event)
        if event.kind == "version":
            break
    assert missed == [event for event in told if event.id > middle]
