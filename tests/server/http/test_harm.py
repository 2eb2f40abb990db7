"""What harms a running server from outside: state files that are no state of its model, a disk without room,
a Redis that goes amid an answer. Each is told, and the session's last version stands.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mnemosyne.checkpoints.snapshot import dump_state, load_state
from mnemosyne.checkpoints.weights import load_checkpoint
from tests.conftest import RedisServer

from .processes import CONFIG, Process, Start, until
from .test_errors import check

TEXT = "The river Ostrava runs past seven mills, and each mill has a keeper. " * 8


def test_a_state_file_that_is_not_one_of_this_model_and_a_full_disk(start: Start, tiny: object) -> None:
    server = start().ready()
    session_id, undisturbed = server.session(), server.session()
    for one in (session_id, undisturbed):
        server.read(one, TEXT)
        server.ask(one, "Who?")
    stands(server, session_id, undisturbed, version=3)

    data = server.state(session_id)
    url = f"/v1/sessions/{session_id}/state"
    head = int.from_bytes(data[:8], "little")
    harmed = [data[:cut] for cut in (1, 8, head, head + 8, len(data) // 2, len(data) - 1)]
    harmed += [data + b"\0", b"PK\x03\x04" + data]
    harmed += [flipped(data, at) for at in (0, 9, head // 2, head + 8, len(data) // 2, len(data) - 1)]
    for wrong in harmed:
        check(server.http.put(url, content=wrong), 400, "snapshot_corrupt")
    later = data.replace(b'"format_version":"2"', b'"format_version":"9"')
    check(server.http.put(url, content=later), 400, "snapshot_unsupported")
    model = load_checkpoint(tiny).fingerprint  # type: ignore[arg-type]
    state, manifest = load_state(data, config=CONFIG, dtype=torch.float32, model_fingerprint=model)
    foreign = dump_state(state, model_fingerprint="ab" * 32, numerics=manifest.numerics)
    check(server.http.put(url, content=foreign), 422, "state_incompatible")
    check(server.http.put("/v1/sessions/sess_unknown/state", content=data), 404, "session_not_found")
    stands(server, session_id, undisturbed, version=3)

    body = {"prompt": "And now?", "max_tokens": 8, "temperature": 1, "seed": 5, "session_id": session_id}
    made = server.post(f"/v1/sessions/{session_id}/documents", name="later").headers["location"]
    journal = server.http.get(f"/v1/sessions/{session_id}").json()["stored_bytes"]
    for room in (0, journal):  # nothing can be written at all; all but the journal's next record
        with disk_of(server, room):
            check(server.http.post("/v1/completions", json=body), 503, "store_unavailable")
            streamed = server.http.post("/v1/completions", json={**body, "stream": True})
            assert "store_unavailable" in streamed.text and '"session"' not in streamed.text
            upload = server.http.patch(made, content=b"x" * 100_000, headers={"Upload-Offset": "0"})
            check(upload, 503, "store_unavailable")
            assert server.ask(undisturbed, "So?", learn=False)["text"]
    assert server.http.head(made).headers["upload-offset"] == "0"
    server.http.delete(made)
    stands(server, session_id, undisturbed, version=3)
    assert server.ask(session_id, "And now?")["text"] == server.ask(undisturbed, "And now?")["text"]
    stands(server, session_id, undisturbed, version=4)


def test_a_redis_that_goes_amid_an_answer(start_on_redis: Start, redis_server: RedisServer) -> None:
    server = start_on_redis().ready()
    session_id, undisturbed = server.session(), server.session()
    for one in (session_id, undisturbed):
        server.ask(one, "Who?")
    body = {"prompt": "Why?", "max_tokens": 1500, "temperature": 0, "session_id": session_id, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert "data: {" in next(lines)
        redis_server.kill()
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "store_unavailable"
    check(server.http.post("/v1/completions", json={**body, "stream": False}), 503, "store_unavailable")
    redis_server.start()

    def works() -> bool:
        answer = server.http.post("/v1/completions", json={**body, "max_tokens": 3, "stream": False})
        return answer.status_code == 200

    until(works, 30)
    server.post("/v1/completions", **{**body, "session_id": undisturbed, "max_tokens": 3, "stream": False})
    stands(server, session_id, undisturbed, version=3)


def stands(server: Process, session_id: str, undisturbed: str, version: int) -> None:
    """The session is at this version, and to the bit what the one is that nothing happened to."""
    assert server.http.get(f"/v1/sessions/{session_id}").json()["version"] == version
    assert server.state(session_id) == server.state(undisturbed)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


@contextmanager
def disk_of(server: Process, size: int) -> Iterator[None]:
    """The server can't make a file larger than ``size``."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux can limit a process that runs; tests/checkpoints fills a disk everywhere")
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
