"""Turns: whole or not at all, repeated once under a key, and without a trace where nothing is learned."""

from __future__ import annotations

import asyncio
import re

import pytest

from mnemosyne.engine.errors import (
    Cancelled,
    IdempotencyMismatch,
    IdempotencyRunning,
    RequestError,
    SessionBusy,
    SessionNotFound,
    VersionMismatch,
    VersionNotFound,
)
from mnemosyne.server.sessions.service import SessionService
from tests.server.sessions.harness import (
    TENANT,
    answer,
    ask,
    key,
    new_session,
    state,
    tokenizer,
    turn,
    until,
)

LONG = 5000
"""Tokens of an answer that is still being made when a test has done what it wants to."""


async def test_a_turn_commits_prompt_answer_and_end_together(service: SessionService) -> None:
    session_id = await new_session(service)
    end = tokenizer().encode("\n")
    first = await turn(service, session_id, "Who keeps the first mill?", end_of_turn=end)
    assert first.session is not None
    read = first.prompt_tokens + first.completion_tokens + len(end)
    assert (first.session.version, first.session.tokens_seen) == (2, read)
    assert (first.session.reused_tokens, first.session.recomputed_tokens) == (0, 0)
    second = await turn(service, session_id, "And the second?")
    assert second.session is not None
    assert (second.session.version, second.session.reused_tokens) == (3, read)
    said = await service.transcript(TENANT, session_id)
    assert [entry["kind"] for entry in said] == ["input", "generated", "input", "input", "generated"]
    assert said[0]["text"] == "Who keeps the first mill?" and said[1]["text"] == first.text
    assert [version.version for version in await service.versions(TENANT, session_id)] == [1, 2, 3]


async def test_without_learning_the_answer_is_the_same_and_nothing_stays(service: SessionService) -> None:
    session_id = await new_session(service)
    await turn(service, session_id, "The first keeper is called Ann.")
    before = await state(service, session_id)
    dry = await asyncio.gather(*(turn(service, session_id, "Her name?", learn=False) for _ in range(4)))
    assert await state(service, session_id) == before
    assert (await service.get(TENANT, session_id)).version == 2
    learned = await turn(service, session_id, "Her name?")
    assert {run.text for run in dry} == {learned.text}
    again = await turn(service, session_id, "Her name?", learn=False, version=2)
    assert again.text == learned.text and again.session is not None and again.session.version == 2


async def test_turns_read_beside_one_that_learns(service: SessionService) -> None:
    session_id = await new_session(service)
    await turn(service, session_id, "The first keeper is called Ann.")
    writing = await service.turn(TENANT, session_id, ask("Tell all.", LONG))
    await anext(aiter(writing))
    await turn(service, session_id, "Her name?", learn=False)
    with pytest.raises(SessionBusy):
        await service.turn(TENANT, session_id, ask("Her name?"))
    await writing.aclose()


async def test_text_past_a_stop_string_is_not_committed(service: SessionService) -> None:
    session_id, other = await new_session(service), await new_session(service)
    whole = await turn(service, session_id, "Tell me.", max_tokens=24, learn=False)
    found = re.search("[a-z]{2}", whole.text[3:])
    assert found is not None, whole.text
    stop = found[0]
    text = whole.text[: whole.text.index(stop)]
    stopped = await turn(service, session_id, "Tell me.", max_tokens=24, stop=("no such text", stop))
    assert (stopped.text, stopped.finish_reason) == (text, "stop")
    said = await service.transcript(TENANT, session_id)
    assert [entry["text"] for entry in said] == ["Tell me.", text]
    await turn(service, other, "Tell me.", max_tokens=24, stop=(stop,))
    assert await state(service, session_id) == await state(service, other)


async def test_a_client_that_leaves_leaves_no_trace(service: SessionService) -> None:
    session_id = await new_session(service)
    await turn(service, session_id, "The first keeper is called Ann.")
    before = await state(service, session_id)
    for tokens in range(3):
        stream = await service.turn(TENANT, session_id, ask("Tell all.", LONG))
        for _ in range(tokens):
            await anext(aiter(stream))
        await stream.aclose()
    assert await state(service, session_id) == before
    assert (await turn(service, session_id, "Her name?")).session is not None
    assert (await service.get(TENANT, session_id)).version == 3


async def test_a_cancelled_turn_leaves_no_trace(service: SessionService) -> None:
    session_id = await new_session(service)
    stream = await service.turn(TENANT, session_id, ask("Tell all.", LONG, idempotency=key("a")))
    await anext(aiter(stream))
    assert await service.cancel(TENANT, session_id) == 1
    with pytest.raises(Cancelled):
        await answer(stream)
    assert (await service.get(TENANT, session_id)).version == 1
    assert (await turn(service, session_id, "Now?", idempotency=key("a"))).repeated is False


async def test_a_keyed_turn_goes_on_when_its_client_is_lost(service: SessionService) -> None:
    session_id = await new_session(service)
    stream = await service.turn(TENANT, session_id, ask("Tell all.", 60, idempotency=key("a")))
    with pytest.raises(IdempotencyRunning):
        await service.turn(TENANT, session_id, ask("Tell all.", 60, idempotency=key("a")))
    await stream.aclose()

    async def committed() -> bool:
        return (await service.get(TENANT, session_id)).version == 2

    await until(committed)
    again = await turn(service, session_id, "Tell all.", max_tokens=60, idempotency=key("a"))
    assert again.repeated and again.completion_tokens == 60
    assert again.session is not None and again.session.version == 2
    with pytest.raises(IdempotencyMismatch):
        await service.turn(TENANT, session_id, ask("Other.", idempotency=key("a", "other")))
    assert (await service.get(TENANT, session_id)).version == 2


async def test_what_does_not_fit_is_refused_and_changes_nothing(service: SessionService) -> None:
    session_id = await new_session(service)
    with pytest.raises(VersionMismatch) as caught:
        await service.turn(TENANT, session_id, ask("Hello", if_match=5))
    assert caught.value.attributes["version"] == 1
    with pytest.raises(VersionNotFound):
        await service.turn(TENANT, session_id, ask("Hello", learn=False, version=9))
    with pytest.raises(RequestError):
        await service.turn(TENANT, session_id, ask("Hello", version=1))
    with pytest.raises(RequestError) as empty:
        await turn(service, session_id, "")
    assert empty.value.param == "prompt"
    for tenant, unknown in (("another", session_id), (TENANT, "sess_unknown")):
        with pytest.raises(SessionNotFound):
            await service.turn(tenant, unknown, ask("Hello"))
    assert (await turn(service, session_id, "Hello", if_match=1)).session is not None


async def test_a_stateless_completion_is_a_new_sessions_first_answer(service: SessionService) -> None:
    alone = await answer(await service.complete(TENANT, ask("Who keeps the mill?", 30)))
    session_id = await new_session(service)
    assert alone.session is None
    assert (await turn(service, session_id, "Who keeps the mill?", max_tokens=30)).text == alone.text
    assert service.stats()["turns_active"] == 0
