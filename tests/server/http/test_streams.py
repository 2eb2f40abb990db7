"""The bytes of a stream, and what happens when its reader leaves."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx

from .conftest import MakeServer
from .running import RunningServer


def events(raw: bytes) -> list[Any]:
    """The stream's data lines; every event must be one line and a blank one."""
    assert raw.endswith(b"\n\n")
    found = []
    for block in raw.decode().split("\n\n")[:-1]:
        if block:
            assert block.startswith("data: ") and "\n" not in block
            found.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
    return found


def chat(**extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Sky?"}], "temperature": 0, "stream": True, **extra}


def test_framing(server: RunningServer) -> None:
    answer = server.http.post(
        "/v1/chat/completions",
        json=chat(stream_options={"include_usage": True}),
        headers={"X-Request-Id": "mine"},
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"] == "mine"
    *chunks, usage, done = events(answer.content)
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] >= 5
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_usage_only_where_it_was_asked_for(server: RunningServer) -> None:
    body = {"prompt": "sky:", "max_tokens": 3, "temperature": 0, "stream": True}
    plain = events(server.http.post("/v1/completions", json=body).content)
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain[:-1])
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    counted = events(server.http.post("/v1/completions", json=body).content)[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in counted]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 3
    assert counted[-1]["choices"] == []


def test_the_session_stands_on_the_chunk_with_the_finish_reason(server: RunningServer) -> None:
    session_id = server.session()
    answer = server.http.post("/v1/chat/completions", json=chat(session_id=session_id))
    chunks = events(answer.content)[:-1]
    assert [chunk for chunk in chunks if "session" in chunk] == [chunks[-1]]
    assert chunks[-1]["session"]["id"] == session_id == answer.headers["x-session-id"]


def test_headers_go_at_once_and_silence_is_filled_with_blank_lines(make_server: MakeServer) -> None:
    server = make_server(sse_ping_interval=0.05)
    server.model.gate.clear()
    with server.http.stream("POST", "/v1/chat/completions", json=chat()) as answer:
        assert answer.status_code == 200  # nothing was computed yet
        raw = answer.iter_raw()
        assert [next(raw), next(raw)] == [b"\n\n", b"\n\n"]
        server.model.gate.set()
        rest = b"".join(raw)
    assert rest.startswith(b"data: {") or rest.startswith(b"\n\ndata: {")
    assert events(rest)[-1] == "[DONE]"


def test_no_blank_lines_when_they_are_off(make_server: MakeServer) -> None:
    server = make_server(sse_ping_interval=0)
    server.model.delay = 0.05
    raw = server.http.post("/v1/chat/completions", json=chat()).content
    assert b"\n\n\n" not in raw and raw.startswith(b"data")


def test_a_refusal_before_the_stream_has_its_status(server: RunningServer) -> None:
    missing = server.http.post("/v1/chat/completions", json=chat(session_id="0" * 32))
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "session_not_found"
    empty = server.http.post("/v1/completions", json={"prompt": "", "stream": True})
    assert empty.status_code == 400 and empty.json()["error"]["param"] == "prompt"


def test_a_failure_inside_the_stream_is_an_event_before_done(make_server: MakeServer) -> None:
    server = make_server()
    server.model.delay = 0.02
    body = {"prompt": "x", "max_tokens": 10_000, "stream": True, "temperature": 0}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.model.broken = True
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    failure = json.loads(rest[-2][6:])["error"]
    assert set(failure) == {"message", "type", "param", "code"}
    assert failure["type"] == "server_error" and "secret" not in failure["message"]


def test_a_reader_who_leaves_cancels_at_the_next_step(make_server: MakeServer) -> None:
    server = make_server()
    session_id = server.session()
    server.model.delay = 0.02
    body = {"prompt": "x", "max_tokens": 100_000, "stream": True, "temperature": 0, "session_id": session_id}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.gauge("num_requests_running") == 1
    server.until_gauge("num_requests_running", 0)
    server.until_gauge("engine_requests_decoding", 0)
    steps = server.model.decoded
    time.sleep(0.1)
    assert server.model.decoded == steps
    assert server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] == 0
    server.model.delay = 0.0
    again = server.http.post("/v1/completions", json={**body, "max_tokens": 2, "stream": False})
    assert again.status_code == 200  # the session is free


def test_a_client_who_leaves_an_unstreamed_answer_cancels_it_too(make_server: MakeServer) -> None:
    server = make_server()
    server.model.delay = 0.02
    body = json.dumps({"prompt": "x", "max_tokens": 100_000}).encode()
    host = httpx.URL(server.url)
    with socket.create_connection((host.host, host.port or 80)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.until_gauge("num_requests_running", 1)
    server.until_gauge("num_requests_running", 0)
    server.until_gauge("engine_requests_decoding", 0)


def test_a_keyed_turn_goes_on_without_its_client(make_server: MakeServer) -> None:
    server = make_server()
    session_id = server.session()
    server.model.delay = 0.01
    body = {"prompt": "x", "max_tokens": 40, "temperature": 0, "session_id": session_id, "stream": True}
    headers = {"Idempotency-Key": "once"}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] != 41:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    repeat = server.http.post("/v1/completions", json={**body, "stream": False}, headers=headers)
    assert repeat.json()["choices"][0]["text"] == "x" * 40
    assert server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] == 41
    streamed = events(server.http.post("/v1/completions", json=body, headers=headers).content)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed[:-1]) == "x" * 40
