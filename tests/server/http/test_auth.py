"""Keys, tenants, and what one tenant can't do to another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mnemosyne.engine.errors import ConfigError
from mnemosyne.server.auth import KeyRing

from .conftest import MakeServer
from .running import RunningServer


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    keys = {"a-key": "anna", "a-new-key": "anna", "b-key": "bert"}
    path.write_text(json.dumps({sha256(key): tenant for key, tenant in keys.items()}))
    return path


@pytest.fixture
def guarded(make_server: MakeServer, keys_file: Path) -> RunningServer:
    return make_server(keys_file=keys_file, quota_sessions=2)


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer", "Basic YTpi"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/docs", "/nothing"])
def test_every_route_needs_a_key(guarded: RunningServer, path: str, authorization: str | None) -> None:
    answer = guarded.http.get(path, headers={"Authorization": authorization} if authorization else {})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.json()["error"]["type"] == "authentication_error"


def test_the_document_says_so(guarded: RunningServer) -> None:
    paths = guarded.http.get("/openapi.json", headers=bearer("a-key")).json()["paths"]
    assert paths["/v1/usage"]["get"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in paths["/health/ready"]["get"]


def test_but_the_health_routes(guarded: RunningServer) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert guarded.http.get(path).status_code == 200


def test_another_tenants_session_is_not_there(guarded: RunningServer) -> None:
    made = guarded.http.post("/v1/sessions", json={}, headers=bearer("a-key"))
    session_id = made.json()["id"]
    assert guarded.http.get(f"/v1/sessions/{session_id}", headers=bearer("a-new-key")).status_code == 200
    url = f"/v1/sessions/{session_id}"
    attempts: list[tuple[str, str, Any]] = [
        ("GET", url, None),
        ("PATCH", url, {}),
        ("DELETE", url, None),
        ("GET", f"{url}/versions", None),
        ("POST", f"{url}/fork", {}),
        ("POST", f"{url}/rewind", {"version": 0}),
        ("POST", f"{url}/documents", {"name": "n", "text": "t"}),
        ("GET", f"{url}/state", None),
        ("GET", f"{url}/events", None),
        ("POST", f"{url}/cancel", None),
        ("POST", "/v1/completions", {"prompt": "a", "session_id": session_id}),
    ]
    for method, path, body in attempts:
        theirs = guarded.http.request(method, path, json=body, headers=bearer("b-key"))
        never = guarded.http.request(
            method,
            path.replace(session_id, "0" * len(session_id)),
            json=json.loads(json.dumps(body).replace(session_id, "0" * len(session_id))),
            headers=bearer("b-key"),
        )
        assert theirs.status_code == never.status_code == 404, (method, path, theirs.text)
        assert theirs.json() == never.json(), path
    listed = guarded.http.get("/v1/sessions", headers=bearer("b-key")).json()
    assert listed["data"] == []


def test_the_number_of_sessions_is_limited_for_each_tenant(guarded: RunningServer) -> None:
    for status in (201, 201, 429):
        answer = guarded.http.post("/v1/sessions", json={}, headers=bearer("b-key"))
        assert answer.status_code == status
    assert answer.json()["error"]["code"] == "quota_exceeded" and answer.headers["retry-after"]
    assert guarded.http.post("/v1/sessions", json={}, headers=bearer("a-key")).status_code == 201
    usage = guarded.http.get("/v1/usage", headers=bearer("b-key")).json()
    assert (usage["tenant"], usage["sessions"], usage["max_sessions"]) == ("bert", 2, 2)
    assert usage["stored_bytes"] > 0


def test_tokens_a_minute_and_stored_bytes_are_limited(make_server: MakeServer) -> None:
    server = make_server(quota_tokens_per_minute=50, quota_stored_bytes=3000)
    body = {"prompt": "a" * 60, "max_tokens": 1}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    refused = server.http.post("/v1/completions", json=body)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) > 5
    usage = server.http.get("/v1/usage").json()
    assert usage["tokens"] == 61 and usage["tokens_remaining"] == 0

    other = make_server(quota_stored_bytes=3000)
    session_id = other.session()
    answer = other.http.post(f"/v1/sessions/{session_id}/documents", json={"name": "n", "text": "a" * 4000})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "quota_exceeded"


def test_keys_rotate_without_a_restart(keys_file: Path) -> None:
    ring = KeyRing(keys_file)
    assert ring.tenant("Bearer a-key") == "anna" and ring.tenants == ["anna", "bert"]
    keys_file.write_text(json.dumps({sha256("c-key"): "carl"}))
    assert ring.tenant("bearer c-key") == "carl"
    keys_file.write_text("{")
    assert ring.tenant("Bearer c-key") == "carl"  # a broken file takes no key away


@pytest.mark.parametrize("content", ["{", "[]", '{"key": "tenant"}', '{"' + "0" * 64 + '": 3}'])
def test_a_keys_file_that_is_wrong_is_refused_at_start(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="keys file"):
        KeyRing(path)
