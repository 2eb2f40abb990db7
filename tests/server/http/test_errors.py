"""Every failure leaves in one envelope, with its status, its code, and the headers that help."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from mnemosyne.checkpoints.redis_store import RedisStore
from mnemosyne.engine import errors as tree
from mnemosyne.server.errors import TABLE, answer_for, describe

from .conftest import MakeServer
from .running import RunningServer


def check(answer: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    assert body["error"]["message"] and answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def test_each_class_of_the_tree_has_a_row_and_no_bug_tells_its_insides() -> None:
    def classes(base: type[Exception]) -> list[type[Exception]]:
        return [base, *(c for sub in base.__subclasses__() for c in classes(sub))]

    for cls in classes(tree.MnemosyneError):
        row = answer_for(cls("m"))  # type: ignore[call-arg]
        assert row is not TABLE[Exception] or cls in (
            tree.MnemosyneError, tree.SessionError, tree.EngineError, tree.ConfigError, tree.IdempotencyError
        )  # fmt: skip
    for error in (tree.StatesFull("m"), tree.DeviceFull("m", retry_after=5)):
        row, _, headers = describe(error)
        assert row.status == 503 and headers["Retry-After"] == str(error.attributes.get("retry_after", 1))
    assert "secret" not in json.dumps(describe(ValueError("secret"))[1])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 3.5}, "prompt"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"256": 1}}, "logit_bias"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "a", "min_tokens": 3}, "min_tokens"),
        ({"prompt": "a", "version": 1}, "version"),
        ({"prompt": "a", "conversation": {"name": "x"}}, "conversation"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
)
def test_a_wrong_field_is_named(server: RunningServer, body: dict[str, Any], param: str) -> None:
    answer = server.http.post(
        "/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    code = answer.json()["error"]["code"]
    error = check(answer, 400, code, answer.json()["error"]["param"])
    assert code in ("invalid_request", "unsupported_value") and error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": "robot", "content": "a"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "content": "a"}],
    ],
)
def test_wrong_messages_are_refused(server: RunningServer, messages: list[Any]) -> None:
    answer = server.http.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("messages")


def test_known_fields_without_effect_pass_and_unknown_ones_are_named(server: RunningServer) -> None:
    body = {
        "prompt": "sky:", "max_tokens": 1, "echo": False, "best_of": 1, "logprobs": None, "user": "u",
        "frobnicate": 1, "a b": 2, "stream_options": None,
    }  # fmt: skip
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-mnemosyne-ignored-fields"] == "frobnicate, a%20b"
    streamed = server.http.post("/v1/completions", json={**body, "stream": True})
    assert streamed.headers["x-mnemosyne-ignored-fields"] == "frobnicate, a%20b"


def test_not_json(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    check(server.http.post("/v1/completions", content=b"{", headers=headers), 400, "invalid_request")
    check(server.http.post("/v1/completions", content=b"\xff", headers=headers), 400, "invalid_request")
    check(server.http.post("/v1/completions", data={"prompt": "a"}), 415, "unsupported_media_type")


def test_what_a_session_that_learns_cannot_do(server: RunningServer) -> None:
    session_id = server.session()
    for body, param in (({"prompt": "a", "n": 2}, "n"), ({"prompt": ["a", "b"]}, "prompt")):
        answer = server.http.post("/v1/completions", json={**body, "session_id": session_id})
        check(answer, 400, "invalid_request", param)


def test_routes_and_methods(server: RunningServer) -> None:
    check(server.http.get("/v1/nothing"), 404, "route_not_found")
    check(server.http.delete("/v1/completions"), 405, "method_not_allowed")
    taken = server.http.put(f"/v1/sessions/{'0' * 32}")
    check(taken, 405, "method_not_allowed")
    assert taken.headers["allow"] == "DELETE, GET, PATCH"
    check(server.http.get("/v1/models/other"), 404, "model_not_found", "model")
    check(server.http.post("/v1/sessions", json={"model": "other"}), 404, "model_not_found", "model")


def test_too_long_for_a_request(make_server: MakeServer) -> None:
    server = make_server(max_request_tokens=10)
    error = check(
        server.http.post("/v1/completions", json={"prompt": "sky:", "max_tokens": 7}),
        400,
        "context_length_exceeded",
        "prompt",
    )
    assert "11" in error["message"] and "10" in error["message"]
    assert server.http.post("/v1/completions", json={"prompt": "sky:", "max_tokens": 6}).status_code == 200


def test_too_large_by_its_announced_length_and_by_counting(make_server: MakeServer) -> None:
    server = make_server(max_request_bytes=1000, max_upload_bytes=2000)
    headers = {"Content-Type": "application/json"}
    large = json.dumps({"prompt": "a" * 1000}).encode()
    check(server.http.post("/v1/completions", content=large, headers=headers), 413, "body_too_large")

    def pieces() -> Any:
        yield from (large[i : i + 100] for i in range(0, len(large), 100))

    check(server.http.post("/v1/completions", content=pieces(), headers=headers), 413, "body_too_large")
    session_id = server.session()
    url = f"/v1/sessions/{session_id}/documents"
    document = server.http.post(url, json={"name": "d"}).json()["id"]
    upload = server.http.patch(f"{url}/{document}", content=b"a" * 2001, headers={"Upload-Offset": "0"})
    check(upload, 413, "body_too_large")
    assert server.http.head(f"{url}/{document}").headers["upload-offset"] == "0"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(make_server: MakeServer, stream: bool) -> None:
    server = make_server(max_queued_tokens=64)
    server.model.delay = 0.05
    body = {"prompt": "a" * 40, "max_tokens": 1, "stream": stream}
    with ThreadPoolExecutor(6) as pool:  # while a step runs, two more of them are one too many
        answers = list(pool.map(lambda _: server.http.post("/v1/completions", json=body), range(6)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 1 <= len(refused) < 6
    for answer in refused:
        check(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
    assert server.http.post("/v1/completions", json=body).status_code == 200


def test_a_store_that_is_gone_and_comes_back(make_server: MakeServer, redis_server: Any) -> None:
    server = make_server(store=RedisStore(redis_server.url, timeout=0.5, connect_timeout=0.2))
    session_id = server.session()
    body = {"prompt": "sky:", "max_tokens": 2, "temperature": 0, "session_id": session_id}
    redis_server.kill()
    refused = server.http.post("/v1/sessions", json={})
    check(refused, 503, "store_unavailable")
    assert refused.headers["retry-after"]
    check(server.http.post("/v1/completions", json=body), 503, "store_unavailable")
    ready = server.http.get("/health/ready")
    assert ready.status_code == 503 and ready.json()["status"] == "unavailable"
    assert server.http.get("/health/live").status_code == 200
    stateless = server.http.post("/v1/completions", json={"prompt": "sky:"})
    assert stateless.status_code == 200  # what needs no store still works
    redis_server.start()
    server.until(lambda: server.http.get("/health/ready").status_code == 200)
    again = server.http.post("/v1/completions", json=body)
    assert again.status_code == 200, again.text
    assert again.json()["session"]["tokens_seen"] == 6  # the failed turn left no trace


def test_a_bug_is_told_in_general_words_under_the_requests_id(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    monkeypatch.setattr(server.runtime.tokenizer, "decode", lambda ids: 1 / 0)
    answer = server.http.post("/detokenize", json={"tokens": [1]}, headers={"X-Request-Id": "mine"})
    error = check(answer, 500, "internal_error")
    assert "division" not in error["message"] and answer.headers["x-request-id"] == "mine"


def test_while_draining(make_server: MakeServer) -> None:
    server = make_server()
    server.runtime.phase = "draining"
    refused = server.http.post("/v1/completions", json={"prompt": "sky:"})
    check(refused, 503, "draining")
    assert refused.headers["retry-after"]
    ready = server.http.get("/health/ready")
    assert ready.status_code == 503 and ready.json()["status"] == "shutting_down"
    assert (
        server.http.get("/health").status_code == 503 and server.http.get("/health/live").status_code == 200
    )
    server.runtime.phase = "ready"
