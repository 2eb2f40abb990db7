"""Coming back: after a crash, after eviction, from a snapshot that is damaged, and without a log."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import StateIncompatible, VersionNotFound
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.server.sessions.service import SessionService
from tests.server.sessions.harness import (
    TENANT,
    TEXT,
    ask,
    make_engine,
    make_service,
    new_session,
    read_document,
    state,
    turn,
)


async def test_a_crash_loses_nothing_that_was_answered(any_store: SessionStore, engine: InlineEngine) -> None:
    before = make_service(any_store, engine)
    session_id = await new_session(before, metadata={"kept": True})
    await read_document(before, session_id, TEXT * 5)
    told = await turn(before, session_id, "Who keeps the first mill?")
    expected = await state(before, session_id)
    # Nothing is drained: the next service has the store alone.
    after = make_service(any_store, engine)
    info = await after.get(TENANT, session_id)
    assert (info.version, info.metadata, info.tier) == (3, {"kept": True}, "store")
    answer = await turn(after, session_id, "And the second?", learn=False)
    assert answer.session is not None and told.session is not None
    assert answer.session.recomputed_tokens == told.session.tokens_seen, "there was no snapshot"
    assert await state(after, session_id) == expected
    assert answer.text == (await turn(before, session_id, "And the second?", learn=False)).text
    await after.drain()
    third = make_service(any_store, engine)
    answer = await turn(third, session_id, "And the second?", learn=False)
    assert answer.session is not None and answer.session.recomputed_tokens == 0, "drain took a snapshot"
    assert answer.session.reused_tokens == told.session.tokens_seen


async def test_a_damaged_snapshot_is_refused_and_the_log_makes_up_for_it(
    service: SessionService, directory: DirectoryStore, engine: InlineEngine, tmp_path: Path
) -> None:
    session_id = await new_session(service)
    await turn(service, session_id, "The first keeper is called Ann.")
    await service.name_version(TENANT, session_id, name="good")
    told = await turn(service, session_id, "Why?")
    await service.name_version(TENANT, session_id, name="bad")
    expected = await state(service, session_id)
    newest = directory.list_snapshots(session_id)[-1].version
    [path] = tmp_path.glob(f"data/sessions/{session_id}/snapshots/{newest}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    after = make_service(directory, engine)
    answer = await turn(after, session_id, "And then?", learn=False)
    assert answer.session is not None and told.session is not None
    assert answer.session.recomputed_tokens == told.prompt_tokens + told.completion_tokens
    assert await state(after, session_id) == expected
    assert (await after.get(TENANT, session_id)).health == "degraded"
    assert after.stats()["restore_refused_total"] == 1
    events = after.events(TENANT, session_id, last_event_id=0)
    restored = await anext(aiter(events))
    assert restored.kind == "tier"
    assert [refused["code"] for refused in restored.data["refused_snapshots"]] == ["SnapshotCorrupt"]
    await events.aclose()  # type: ignore[attr-defined]


async def test_a_snapshot_whose_record_never_came_is_no_others(
    service: SessionService, directory: DirectoryStore, engine: InlineEngine
) -> None:
    session_id, other = await new_session(service), await new_session(service)
    await turn(service, other, "ANN", max_tokens=5)
    # What a crash leaves between an import's snapshot and its record: one under the index of the next turn.
    lease = directory.acquire(session_id, "one", 30)
    directory.put_snapshot(session_id, 1, await state(service, other), lease.fence)
    directory.release(lease)
    await turn(service, session_id, "BOB", max_tokens=5)
    expected = await state(service, session_id)
    assert expected != await state(service, other)
    assert await state(make_service(directory, engine), session_id) == expected


async def test_a_session_of_other_weights_is_refused(directory: DirectoryStore, engine: InlineEngine) -> None:
    before = make_service(directory, engine)
    session_id = await new_session(before)
    await turn(before, session_id, "The first keeper is called Ann.")
    other = make_engine(fingerprint="f" * 64)
    await other.start()
    after = make_service(directory, other)
    assert (await after.get(TENANT, session_id)).health == "incompatible"
    for request in (ask("Her name?"), ask("Her name?", learn=False)):
        with pytest.raises(StateIncompatible):
            await after.turn(TENANT, session_id, request)
    await other.close()


async def test_more_sessions_than_there_is_room_for(directory: DirectoryStore, engine: InlineEngine) -> None:
    service = make_service(directory, engine, resident_bytes=1)  # room for four, the least there is
    ids = [await new_session(service) for _ in range(7)]
    texts = {}
    for number, session_id in enumerate(ids):
        await turn(service, session_id, f"This is session {number}.")
    assert service.stats()["sessions_resident"] == 4 and service.stats()["snapshots_written_total"] == 3
    assert [(await service.get(TENANT, i)).tier for i in ids] == ["store"] * 3 + ["device"] * 4
    for session_id in ids:
        answer = await turn(service, session_id, "Which one?", learn=False)
        assert answer.session is not None and answer.session.recomputed_tokens == 0
        texts[session_id] = answer.text
    roomy = make_service(directory, engine)
    for session_id in ids:
        assert (await turn(roomy, session_id, "Which one?", learn=False)).text == texts[session_id]
    held = (await engine.stats())["handles"]
    assert held < 2 * len(ids) + 5, "no handle is left behind"


async def test_snapshots_are_taken_while_reading_and_thin_out(
    directory: DirectoryStore, engine: InlineEngine
) -> None:
    service = make_service(directory, engine, replay_seconds=0.001)  # every 1024 tokens
    session_id = await new_session(service)
    for _ in range(12):
        await read_document(service, session_id, TEXT * 10)
    await service._core.snapshots.settle()
    kept = directory.list_snapshots(session_id)
    assert service.stats()["snapshots_written_total"] > len(kept) >= 3
    again = make_service(directory, engine)
    assert await state(again, session_id, 5) == await state(service, session_id, 5)
    answer = await turn(again, session_id, "And?", learn=False)
    assert answer.session is not None and answer.session.recomputed_tokens < 8192


async def test_without_retained_input_the_kept_states_are_all_there_is(
    directory: DirectoryStore, engine: InlineEngine, tmp_path: Path
) -> None:
    service = make_service(directory, engine)
    session_id = await new_session(service, retain_input=False)
    normal = await new_session(service)
    for each in (session_id, normal):
        await read_document(service, each, TEXT * 4)
        await turn(service, each, "Who keeps the first mill?")
    expected = await state(service, normal)
    again = make_service(directory, engine)
    assert await state(again, session_id) == expected
    assert await state(again, session_id, 2) == await state(again, normal, 2)
    with pytest.raises(VersionNotFound):
        await again.rewind(TENANT, session_id, tokens_seen=10)
    rewound = await again.rewind(TENANT, session_id, version=2)
    forked = await again.fork(TENANT, session_id, version=3)
    assert rewound.version == 4 and await state(again, forked.id) == expected
    third = make_service(directory, engine)
    assert await state(third, session_id) == await state(third, normal, 2)
    assert await state(third, forked.id) == expected
    [journal] = tmp_path.glob(f"data/sessions/{session_id}/journal")
    assert b'"ids"' not in journal.read_bytes()
    assert all(entry["tokens"] == [] for entry in await third.transcript(TENANT, session_id))
