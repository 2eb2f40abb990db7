"""``kill -9`` of the server while it reads, while it answers and while it takes a snapshot: what it had
acknowledged is there, and the session is to the bit the one of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.conftest import RedisServer

from .processes import Process, Start, until

LONG = "The river Ostrava runs past 七 mills; each has a keeper (Größe, 你好, Ann), none knows why.\n" * 300
SHORT = "A second text: the mill of Ann burnt down, 🙂 or so they say. " * 20
FIRST, SECOND = "Who keeps the mill?", "And why?"

Writing = Callable[[], Any]
"""Waits until the server is writing a snapshot."""


@pytest.fixture(params=["directory", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Start, Writing]]:
    if request.param == "directory":
        aside = "data/sessions/*/snapshots/*.aside"
        start = request.getfixturevalue("start")
        yield start, lambda: until(lambda: any(tmp_path.glob(aside)))
        return
    server: RedisServer = request.getfixturevalue("redis_server")

    def until_a_piece_is_written() -> None:
        with redis.Redis.from_url(server.url) as client, client.monitor() as monitor:
            next(said for said in monitor.listen() if "pieces" in said["command"])

    yield request.getfixturevalue("start_on_redis"), until_a_piece_is_written


def test_a_session_outlives_every_kill(place: tuple[Start, Writing]) -> None:
    start, until_a_snapshot_is_written = place
    server = start().ready()
    session_id = server.session()

    first, second = announce(server, session_id, LONG), announce(server, session_id, SHORT)
    long, short = LONG.encode(), SHORT.encode()
    for begin in range(0, len(long), 4999):  # cuts characters
        put(server, first, begin, long[begin : begin + 4999], begin + 4999 >= len(long))
    put(server, second, 0, short[:45], False)
    assert short[:45].decode(errors="ignore").encode() != short[:45]
    until(lambda: server.http.get(first).json()["tokens_absorbed"] > 0)
    assert server.http.get(first).json()["status"] == "absorbing"
    server.kill()

    server = start().ready()
    assert server.http.head(second).headers["upload-offset"] == "45"
    put(server, second, 45, short[45:], True)
    server.absorbed(first)
    server.absorbed(second)
    told = keyed(server, session_id, FIRST)
    body = {"prompt": SECOND, "max_tokens": 5000, "session_id": session_id, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert "data: {" in next(lines)
        server.kill()
        with pytest.raises(httpx.TransportError):
            list(lines)

    server = start().ready()
    assert server.http.get(f"/v1/sessions/{session_id}").json()["version"] == told["session"]["version"]
    assert keyed(server, session_id, FIRST) == told  # given again, not learned again
    began = server.ask(session_id, SECOND, tokens=10)
    # Nothing silent: the state was brought back for this turn, and it says by what.
    report = began["session"]
    assert report["version"] == told["session"]["version"] + 1
    assert report["reused_tokens"] + report["recomputed_tokens"] == told["session"]["tokens_seen"]
    with naming(server, session_id) as named:
        until(lambda: len(named) > 1)
        until_a_snapshot_is_written()
        server.kill()

    server = start().ready()
    newest = server.http.get(f"/v1/sessions/{session_id}/versions").json()["data"][-1]
    assert newest["snapshot"] and int(newest["name"]) >= max(named)
    went_on = server.ask(session_id, "", tokens=14)
    assert went_on["session"]["reused_tokens"] == report["tokens_seen"]
    assert went_on["session"]["recomputed_tokens"] == 0

    # A run that was never killed.
    undisturbed = server.session()
    server.read(undisturbed, LONG)
    server.read(undisturbed, SHORT)
    assert what(server.ask(undisturbed, FIRST)) == what(told)
    whole = server.ask(undisturbed, SECOND, tokens=24)
    assert began["text"] + went_on["text"] == whole["text"]
    assert began["logprobs"] + went_on["logprobs"] == whole["logprobs"]
    state = server.state(undisturbed)
    assert server.state(session_id) == state
    imported = server.session()
    assert server.http.put(f"/v1/sessions/{imported}/state", content=state).status_code == 200
    answers = [what(server.ask(s, "So?", learn=False)) for s in (undisturbed, session_id, imported)]
    assert answers == answers[:1] * 3
    assert [server.state(s) for s in (undisturbed, session_id, imported)] == [state] * 3


def announce(server: Process, session_id: str, text: str) -> str:
    data = text.encode()
    facts = {"name": "text", "length": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return server.post(f"/v1/sessions/{session_id}/documents", **facts).headers["location"]


def put(server: Process, url: str, offset: int, data: bytes, last: bool) -> None:
    headers = {"Upload-Offset": str(offset), "Upload-Complete": f"?{int(last)}"}
    answer = server.http.patch(url, content=data, headers=headers)
    assert answer.status_code == 204 and answer.headers["upload-offset"] == str(offset + len(data))


def keyed(server: Process, session_id: str, prompt: str) -> dict[str, Any]:
    server.http.headers["Idempotency-Key"] = "first"
    try:
        return server.ask(session_id, prompt)
    finally:
        del server.http.headers["Idempotency-Key"]


def what(told: dict[str, Any]) -> tuple[str, list[float]]:
    return told["text"], told["logprobs"]


@contextmanager
def naming(server: Process, session_id: str) -> Iterator[list[int]]:
    """Beside: give the newest version one name after the other, which each time takes a snapshot. The list
    grows by the names that were acknowledged; it ends with the server."""
    named: list[int] = []

    def name() -> None:
        with httpx.Client(base_url=server.http.base_url, trust_env=False) as client:
            for number in range(1_000_000):
                try:
                    client.post(f"/v1/sessions/{session_id}/versions", json={"name": str(number)})
                except httpx.TransportError:
                    return
                named.append(number)

    thread = threading.Thread(target=name)
    thread.start()
    try:
        yield named
    finally:
        server.kill()
        thread.join()
