"""The trace of a session: what the model itself says of the same tokens, wherever the session went."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import RequestError, SessionNotFound, VersionNotFound
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.pyramid import GAIN
from mnemosyne.server.sessions import surprise
from mnemosyne.server.sessions.service import SessionService
from mnemosyne.server.sessions.views import SurpriseTrace
from tests.engine.models import small_model
from tests.server.sessions.harness import (
    CONFIG,
    TENANT,
    TEXT,
    make_service,
    new_session,
    read_document,
    state,
    turn,
)

CHUNK = CONFIG.chunk


async def ids_of(service: SessionService, session_id: str) -> list[int]:
    return [token for entry in await service.transcript(TENANT, session_id) for token in entry["tokens"]]


def values_of(trace: SurpriseTrace) -> np.ndarray:
    """`[points, fields]`."""
    return np.array([point.overall for point in trace.points], np.float64)


def spans_of(trace: SurpriseTrace) -> list[tuple[int, int]]:
    return [(point.first, point.last) for point in trace.points]


def computed(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """By the model alone, in one go: `[chunks, fields]`, and `[tokens, 2]`."""
    model = small_model(CONFIG)
    whole = (len(ids) - 1) // CHUNK * CHUNK
    _, trace = model.prefill([model.initial_state()], torch.tensor([ids[:whole]]), per_token=True)
    assert trace.tokens is not None and CONFIG.layers == 1
    return trace.chunks[0, :, 0].astype(np.float64), trace.tokens[0, :, 0].astype(np.float64)


def together(chunks: np.ndarray) -> list[float]:
    """Of several chunks `[n, fields]`."""
    return [*chunks[:, :GAIN].mean(0), np.fmax.reduce(chunks[:, GAIN])]


async def test_what_was_read_and_said(service: SessionService) -> None:
    session_id = await new_session(service)
    await read_document(service, session_id, TEXT * 2)
    await turn(service, session_id, "Who keeps the first mill?", max_tokens=30)
    ids = await ids_of(service, session_id)
    chunks, tokens = computed(ids)
    before = await state(service, session_id)
    trace = await service.surprise(TENANT, session_id)
    assert (trace.first, trace.last, trace.reaches) == (0, len(ids), len(chunks) * CHUNK)
    assert (trace.resolution, trace.coarsest, trace.computed) == (CHUNK, CHUNK, 0)
    assert spans_of(trace) == [(i * CHUNK, (i + 1) * CHUNK) for i in range(len(chunks))]
    np.testing.assert_array_equal(values_of(trace), chunks, "the same bits", strict=True)
    assert all(point.layers == [point.overall] for point in trace.points)

    trace = await service.surprise(TENANT, session_id, first=5, last=101, resolution=1)
    assert spans_of(trace) == [(i, i + 1) for i in range(5, 101)]
    assert (values_of(trace)[:, :2] == tokens[5:101]).all()
    assert all(point.overall[2:] == [None, None] for point in trace.points), "these are a chunk's"
    assert (trace.resolution, trace.coarsest, trace.computed) == (1, 1, 96)
    trace = await service.surprise(TENANT, session_id, first=20, last=47, resolution=10)
    assert spans_of(trace) == [(20, 30), (30, 40), (40, 47)]
    np.testing.assert_allclose(values_of(trace)[2, :2], tokens[40:47].mean(0), rtol=1e-12)

    trace = await service.surprise(TENANT, session_id, resolution=3 * CHUNK)
    assert trace.resolution == 2 * CHUNK and spans_of(trace)[:2] == [(0, 32), (32, 64)]
    np.testing.assert_allclose(values_of(trace)[1], together(chunks[2:4]), 1e-6)
    assert await state(service, session_id) == before, "no trace of the tracing"


async def test_the_pending_tokens_have_no_values_yet(service: SessionService) -> None:
    session_id = await new_session(service)
    assert (await service.surprise(TENANT, session_id)).points == ()
    assert (await service.surprise(TENANT, session_id, resolution=1)).points == ()
    await turn(service, session_id, "x", max_tokens=CHUNK + 3)
    seen = (await service.get(TENANT, session_id)).tokens_seen
    trace = await service.surprise(TENANT, session_id, resolution=1)
    assert CHUNK < seen < 2 * CHUNK and trace.reaches == CHUNK and trace.last == seen
    assert spans_of(trace)[-1] == (CHUNK - 1, CHUNK)


async def test_forks_rewinds_and_versions_carry_their_own(service: SessionService) -> None:
    session_id = await new_session(service)
    await read_document(service, session_id, TEXT)
    await turn(service, session_id, "Who?", max_tokens=40)
    whole = await service.surprise(TENANT, session_id)
    fork = (await service.fork(TENANT, session_id, version=2)).id
    await turn(service, fork, "Another question, and another answer.", max_tokens=40)
    await service.rewind(TENANT, session_id, tokens_seen=70)
    for each in (fork, session_id):
        ids = await ids_of(service, each)
        chunks, tokens = computed(ids)
        np.testing.assert_array_equal(values_of(await service.surprise(TENANT, each)), chunks)
        found = await service.surprise(TENANT, each, resolution=1)
        assert (values_of(found)[:, :2] == tokens).all()
    assert (await service.surprise(TENANT, session_id)).last == 70
    older = await service.surprise(TENANT, session_id, version=3)
    assert older.points == whole.points and older.version == 3
    with pytest.raises(VersionNotFound):
        await service.surprise(TENANT, session_id, version=99)


async def test_it_outlives_a_crash(any_store: SessionStore, engine: InlineEngine) -> None:
    service = make_service(any_store, engine)
    session_id = await new_session(service)
    await read_document(service, session_id, TEXT * 3)
    await service.name_version(TENANT, session_id, name="saved")
    await turn(service, session_id, "Why?", max_tokens=30)
    expected = await service.surprise(TENANT, session_id)
    part = await service.surprise(TENANT, session_id, first=100, last=200, resolution=1)
    after = make_service(any_store, engine)
    assert await after.surprise(TENANT, session_id) == expected, "of a snapshot, and a replay after it"
    assert after.stats()["tokens_replayed_total"] > 0
    assert await after.surprise(TENANT, session_id, first=100, last=200, resolution=1) == part
    np.testing.assert_array_equal(values_of(expected), computed(await ids_of(after, session_id))[0])


async def test_what_was_imported_has_its_trace_but_not_its_tokens(service: SessionService) -> None:
    one, two = await new_session(service), await new_session(service)
    await read_document(service, one, TEXT * 2)
    await service.import_state(TENANT, two, await state(service, one))
    imported = await service.surprise(TENANT, two)
    assert imported.points == (await service.surprise(TENANT, one)).points
    await turn(service, two, "Who keeps the second mill, and who the third?", max_tokens=40)
    assert (await service.surprise(TENANT, two)).points[: len(imported.points)] == imported.points
    with pytest.raises(RequestError) as refused:
        await service.surprise(TENANT, two, first=16, last=32, resolution=1)
    assert refused.value.param == "from"
    seen = (await service.get(TENANT, two)).tokens_seen
    later = await service.surprise(TENANT, two, first=-(-imported.last // CHUNK) * CHUNK, resolution=1)
    assert len(later.points) == later.reaches - later.first > 0 and later.last == seen


async def test_without_retained_input_there_are_chunks_alone(service: SessionService) -> None:
    session_id, normal = await new_session(service, retain_input=False), await new_session(service)
    for each in (session_id, normal):
        await read_document(service, each, TEXT * 2)
    assert (await service.surprise(TENANT, session_id)).points == (
        await service.surprise(TENANT, normal)
    ).points
    with pytest.raises(RequestError) as refused:
        await service.surprise(TENANT, session_id, last=16, resolution=1)
    assert refused.value.param == "resolution"


async def test_text_is_of_the_points_and_not_of_too_many(
    service: SessionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await new_session(service)
    await read_document(service, session_id, TEXT * 2)
    ids = await ids_of(service, session_id)
    trace = await service.surprise(TENANT, session_id, first=20, last=100, text=True)
    assert spans_of(trace)[0] == (16, 32), "points at the edges reach beyond what was asked for"
    decode = service._core.tokenizer.decode
    assert [point.text for point in trace.points] == [decode(ids[a:b]) for a, b in spans_of(trace)]
    assert (await service.surprise(TENANT, session_id, first=20, last=100)).points[0].text is None
    monkeypatch.setattr(surprise, "MAX_TEXT_TOKENS", 95)
    with pytest.raises(RequestError, match="at most 95 tokens, and these points have 96") as refused:
        await service.surprise(TENANT, session_id, first=20, last=100, text=True)
    assert refused.value.param == "text"


async def test_ranges_that_are_refused(service: SessionService) -> None:
    session_id = await new_session(service)
    await read_document(service, session_id, TEXT * 40)
    seen = (await service.get(TENANT, session_id)).tokens_seen
    assert 4096 + CHUNK < seen < 4096 * CHUNK
    for wrong, param in (
        ({"first": seen + 1}, "from"),
        ({"first": 20, "last": 10}, "from"),
        ({"resolution": 1}, "resolution"),
        ({"resolution": 2}, "to"),
        ({"first": 1, "last": 4097, "resolution": 1}, "to"),
    ):
        with pytest.raises(RequestError) as refused:
            await service.surprise(TENANT, session_id, **wrong)
        assert refused.value.param == param, wrong
    assert len((await service.surprise(TENANT, session_id, last=4096, resolution=1)).points) == 4096
    assert (await service.surprise(TENANT, session_id, last=10**15)).last == seen
    assert len((await service.surprise(TENANT, session_id, resolution=2**62)).points) == 1
    with pytest.raises(SessionNotFound):
        await service.surprise("another", session_id)


async def test_old_text_is_kept_coarsely_and_it_is_said(service: SessionService) -> None:
    session_id = await new_session(service)
    await read_document(service, session_id, TEXT * 60)
    trace = await service.surprise(TENANT, session_id, resolution=CHUNK)
    lengths = [last - first for first, last in spans_of(trace)]
    assert trace.resolution == CHUNK == lengths[-1] and trace.coarsest == lengths[0] > CHUNK
    chunks, _ = computed(await ids_of(service, session_id))
    assert len(chunks) > 256 and lengths[-256:] == [CHUNK] * 256
    np.testing.assert_array_equal(values_of(trace)[-256:], chunks[-256:])
    [first, *_] = values_of(trace)
    size = lengths[0] // CHUNK
    np.testing.assert_allclose(first, together(chunks[:size]), rtol=1e-6)


async def test_states_of_the_way_are_no_snapshots(
    directory: DirectoryStore, engine: InlineEngine, tmp_path: Path
) -> None:
    """Tracing holds states inside a document; letting them go must not save them as the document's end."""
    service = make_service(directory, engine, resident_bytes=1)  # room for four
    session_id = await new_session(service)
    await read_document(service, session_id, TEXT * 4)
    expected = await state(service, session_id)
    for first in range(16, 200, 16):
        trace = await service.surprise(TENANT, session_id, first=first, last=first + 16, resolution=4)
        assert len(trace.points) == 4
    assert service.stats()["sessions_resident"] <= 4
    await service.drain()
    after = make_service(directory, engine)
    assert await state(after, session_id) == expected
    assert after.stats()["restore_refused_total"] == 0
