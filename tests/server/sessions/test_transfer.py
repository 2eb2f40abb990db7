"""A state as a file: what was taken out goes in again, and nothing else does."""

from __future__ import annotations

import io
import json
import zipfile

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.errors import (
    SnapshotCorrupt,
    StateIncompatible,
    VersionMismatch,
    VersionNotFound,
)
from mnemosyne.engine.inline import InlineEngine
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


async def test_a_state_goes_out_and_in(
    service: SessionService, directory: DirectoryStore, engine: InlineEngine
) -> None:
    source, target = await new_session(service), await new_session(service)
    await read_document(service, source, TEXT * 3)
    await turn(service, source, "Why?")
    await turn(service, target, "Something else.")
    data = await state(service, source)
    with pytest.raises(VersionMismatch):
        await service.import_state(TENANT, target, data, if_match=1)
    info = await service.import_state(TENANT, target, data, if_match=2)
    assert info.version == 3 and info.tokens_seen == (await service.get(TENANT, source)).tokens_seen
    assert await state(service, target) == data
    same = [await turn(service, each, "And then?") for each in (source, target)]
    assert same[0].text == same[1].text
    again = make_service(directory, engine)
    assert await state(again, target) == await state(again, source)
    with pytest.raises(VersionNotFound):
        await again.rewind(TENANT, target, tokens_seen=10)
    assert (await again.rewind(TENANT, target, version=2)).version == 5
    assert (await again.rewind(TENANT, target, version=3)).version == 6
    assert await state(again, target) == data


async def test_the_log_comes_along(service: SessionService) -> None:
    source, target = await new_session(service), await new_session(service)
    await read_document(service, source, TEXT)
    told = await turn(service, source, "Why?")
    data = await service.export_state(TENANT, source, log=True)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        lines = [json.loads(line) for line in archive.read("log.jsonl").decode().splitlines()]
        assert archive.read("state.safetensors") == await state(service, source)
    assert [(line["kind"], line["text"]) for line in lines] == [
        ("document", TEXT),
        ("input", "Why?"),
        ("generated", told.text),
    ]
    await service.import_state(TENANT, target, data)
    assert await state(service, target) == await state(service, source)


async def test_what_is_no_state_of_this_model_is_refused(service: SessionService) -> None:
    session_id = await new_session(service)
    await turn(service, session_id, "Something.")
    data = await state(service, session_id)
    flipped = bytearray(data)
    flipped[-5] ^= 4
    for wrong in (b"", b"PK\x03\x04 nothing", data[:-1], data[:100], bytes(flipped), data + b"x"):
        with pytest.raises(SnapshotCorrupt):
            await service.import_state(TENANT, session_id, wrong)
    other = make_engine(fingerprint="f" * 64)
    await other.start()
    with pytest.raises(StateIncompatible):
        await other.load("handle", data)
    await other.close()
    assert (await service.get(TENANT, session_id)).version == 2
    assert await state(service, session_id) == data
