"""Versions: forks, rewinds and names end in the state that reading the same tokens afresh gives."""

from __future__ import annotations

import asyncio
import time

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.errors import (
    IdempotencyMismatch,
    RequestError,
    SessionNotFound,
    VersionMismatch,
    VersionNotFound,
)
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.server.sessions.service import SessionService
from tests.server.sessions.harness import (
    TENANT,
    TEXT,
    key,
    make_service,
    new_session,
    read_document,
    state,
    tokenizer,
    turn,
    until,
)


async def test_a_fork_is_its_parents_version_and_outlives_it(
    service: SessionService, directory: DirectoryStore, engine: InlineEngine
) -> None:
    parent = await new_session(service, metadata={"corpus": "mills"})
    await read_document(service, parent, TEXT * 3)
    await turn(service, parent, "Who keeps the first mill?")
    old = await service.fork(TENANT, parent, version=2, idempotency=key("f"))
    new = await service.fork(TENANT, parent)
    assert await service.fork(TENANT, parent, version=2, idempotency=key("f")) is not None
    assert len(await service.list(TENANT)) == 3
    with pytest.raises(IdempotencyMismatch):
        await service.fork(TENANT, parent, idempotency=key("f", "other"))
    assert (old.version, old.metadata) == (1, {"corpus": "mills"})
    assert old.parent is not None and (old.parent.session_id, old.parent.version) == (parent, 2)
    assert await state(service, old.id) == await state(service, parent, 2)
    assert await state(service, new.id) == await state(service, parent)
    await turn(service, parent, "Something else.")
    kept = await state(service, new.id)
    receipt = await service.delete(TENANT, parent)
    assert receipt.kept_for_forks and receipt.session_ids == ()
    with pytest.raises(SessionNotFound):
        await service.get(TENANT, parent)
    again = make_service(directory, engine)
    await again.start([TENANT])
    assert await state(again, new.id) == kept
    assert (await turn(again, old.id, "Who keeps the first mill?")).text is not None
    assert await state(again, old.id) == kept, "the fork went where its parent had gone"
    assert [entry["kind"] for entry in await again.transcript(TENANT, old.id)] == [
        "document",
        "input",
        "generated",
    ]
    assert (await again.delete(TENANT, old.id)).session_ids == (old.id,)
    assert set((await again.delete(TENANT, new.id)).session_ids) == {new.id, parent}
    assert directory.list_sessions(TENANT, None, 10) == []
    await again.drain()


async def test_erasing_takes_the_forks_too(service: SessionService, directory: DirectoryStore) -> None:
    parent = await new_session(service)
    await read_document(service, parent, TEXT)
    child = await service.fork(TENANT, parent)
    grandchild = await service.fork(TENANT, child.id)
    receipt = await service.delete(TENANT, parent, erase=True)
    assert set(receipt.session_ids) == {parent, child.id, grandchild.id}
    assert receipt.removed["journal_bytes"] > 0 and not receipt.kept_for_forks
    assert directory.list_sessions(TENANT, None, 10) == []


async def test_a_rewind_is_a_new_version_equal_to_the_old(service: SessionService) -> None:
    session_id = await new_session(service)
    first = await turn(service, session_id, "The first keeper is called Ann.")
    states = {2: await state(service, session_id)}
    await read_document(service, session_id, TEXT)
    states[3] = await state(service, session_id)
    with pytest.raises(VersionMismatch):
        await service.rewind(TENANT, session_id, version=2, if_match=2)
    info = await service.rewind(TENANT, session_id, version=2, if_match=3, idempotency=key("r"))
    again = await service.rewind(TENANT, session_id, version=2, if_match=3, idempotency=key("r"))
    assert first.session is not None
    assert (
        (info.version, info.tokens_seen)
        == (4, first.session.tokens_seen)
        == (again.version, again.tokens_seen)
    )
    assert await state(service, session_id) == states[2]
    assert await state(service, session_id, 3) == states[3], "the branch it left stays"
    await read_document(service, session_id, TEXT)
    assert await state(service, session_id) == states[3]
    assert [v.made_by for v in await service.versions(TENANT, session_id)] == [
        "created",
        "turn",
        "document",
        "rewound",
        "document",
    ]
    with pytest.raises(RequestError):
        await service.rewind(TENANT, session_id)
    with pytest.raises(RequestError):
        await service.rewind(TENANT, session_id, version=1, tokens_seen=1)
    with pytest.raises(VersionNotFound):
        await service.rewind(TENANT, session_id, version=77)


async def test_a_rewind_reaches_any_token(service: SessionService) -> None:
    session_id, fresh = await new_session(service), await new_session(service)
    ids = tokenizer().encode_document(TEXT * 2)
    await read_document(service, session_id, TEXT * 2)
    await turn(service, session_id, "Why?")
    for count in (len(ids) - 1, 100, 33, 0):
        info = await service.rewind(TENANT, session_id, tokens_seen=count)
        assert info.tokens_seen == count
        other = await new_session(service)
        if count:
            made = await service.create_document(TENANT, other, name="start", tokens=ids[:count])
            await until_version(service, other, 2)
            assert made.status == "queued"
            assert await state(service, session_id) == await state(service, other)
    assert await state(service, session_id) == await state(service, fresh)
    with pytest.raises(VersionNotFound):
        await service.rewind(TENANT, session_id, tokens_seen=1)


async def until_version(service: SessionService, session_id: str, version: int) -> None:
    async def there() -> bool:
        return (await service.get(TENANT, session_id)).version == version

    await until(there)


async def test_names_keep_and_deletion_forgets(service: SessionService) -> None:
    session_id = await new_session(service)
    await turn(service, session_id, "The first keeper is called Ann.")
    named = await service.name_version(TENANT, session_id, name="start", if_match=2, idempotency=key("n"))
    assert (named.version, named.name, named.snapshot) == (2, "start", True)
    await turn(service, session_id, "Why?")
    assert await service.name_version(TENANT, session_id, name="start", idempotency=key("n")) == named
    with pytest.raises(RequestError):
        await service.delete_version(TENANT, session_id, 3)
    await service.delete_version(TENANT, session_id, 2)
    assert [v.version for v in await service.versions(TENANT, session_id)] == [1, 3]
    with pytest.raises(VersionNotFound):
        await service.rewind(TENANT, session_id, version=2)
    with pytest.raises(VersionNotFound):
        await service.delete_version(TENANT, session_id, 2)


async def test_tenants_see_their_own(service: SessionService) -> None:
    mine = await service.create(TENANT, idempotency=key("c"))
    assert await service.create(TENANT, idempotency=key("c")) == mine
    with pytest.raises(IdempotencyMismatch):
        await service.create(TENANT, idempotency=key("c", "other"))
    theirs = await service.create("other", idempotency=key("c"))
    assert mine.id != theirs.id and len(mine.id) == len("sess_") + 32
    assert [info.id for info in await service.list(TENANT)] == [mine.id]
    for call in (
        service.get,
        service.versions,
        service.documents,
        service.delete,
        service.cancel,
        service.fork,
    ):
        with pytest.raises(SessionNotFound):
            await call(TENANT, theirs.id)
    more = [await new_session(service) for _ in range(4)]
    page = await service.list(TENANT, limit=2, after=more[0])
    assert [info.id for info in page] == more[1:3]


async def test_metadata_and_expiry(service: SessionService, directory: DirectoryStore) -> None:
    info = await service.create(TENANT, metadata={"a": 1}, ttl_seconds=60)
    assert info.expires_at is not None and 59 < info.expires_at - time.time() <= 60
    patched = await service.patch(TENANT, info.id, metadata={"b": 2})
    assert (patched.metadata, patched.expires_at, patched.version) == ({"b": 2}, info.expires_at, 1)
    assert (await service.patch(TENANT, info.id, clear_expiry=True)).expires_at is None
    await service.patch(TENANT, info.id, ttl_seconds=0.05)
    await asyncio.sleep(0.06)
    with pytest.raises(SessionNotFound):
        await service.get(TENANT, info.id)
    await until(lambda: not directory.exists(info.id))


async def test_a_state_inside_a_record_is_never_saved_as_the_records(
    directory: DirectoryStore, engine: InlineEngine
) -> None:
    """A rewind into a document: what drain saves is found again, and isn't taken for the document's end."""
    service = make_service(directory, engine)
    session_id = await new_session(service)
    await read_document(service, session_id, TEXT * 3)
    whole = await state(service, session_id)
    rewound = await service.rewind(TENANT, session_id, tokens_seen=40)
    part = await state(service, session_id)
    await service.drain()
    after = make_service(directory, engine)
    assert await state(after, session_id, 2) == whole
    assert await state(after, session_id, rewound.version) == part
    assert (await after.get(TENANT, session_id)).health == "ok"
    assert after.stats()["restore_refused_total"] == 0
    again = make_service(directory, engine)
    assert await state(again, session_id) == part
    assert again.stats()["tokens_replayed_total"] == 0, "there was a snapshot of it"
