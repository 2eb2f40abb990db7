"""The surprise route: a token's surprise is its byte here, so every value can be foretold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .conftest import MakeServer
from .running import RunningServer
from .scripted import CHUNK
from .test_errors import check

TEXT = "the keeper of the first mill is called Ann. " * 8


def trace(server: RunningServer, session_id: str, **params: Any) -> dict[str, Any]:
    answer = server.http.get(f"/v1/sessions/{session_id}/surprise", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def mean(text: str) -> float:
    return sum(text.encode()) / len(text)


def test_the_whole_of_a_session(server: RunningServer) -> None:
    session_id = server.session()
    server.document(session_id, TEXT)
    found = trace(server, session_id)
    reaches = (len(TEXT) - 1) // CHUNK * CHUNK
    session = server.http.get(f"/v1/sessions/{session_id}").json()
    version = session["version"]
    points = found.pop("points")
    assert session["gain"] == max(p["gain"] for p in points), "the session's health, of what it read last"
    assert found == {
        "session_id": session_id,
        "version": version,
        "unit": "tokens",
        "from": 0,
        "to": len(TEXT),
        "reaches": reaches,
        "resolution": CHUNK,
        "coarsest": CHUNK,
    }
    assert [(p["from"], p["to"]) for p in points] == [(i, i + CHUNK) for i in range(0, reaches, CHUNK)]
    for p in points:
        value = mean(TEXT[p["from"] : p["to"]])
        assert p == {"from": p["from"], "to": p["to"]} | dict.fromkeys(
            ("surprise", "momentary", "moved", "gain"), value
        )


def test_the_text_of_points(server: RunningServer) -> None:
    session_id = server.session()
    server.document(session_id, TEXT)
    for params in ({}, {"resolution": 100}, {"from": 13, "to": 21, "resolution": 3}):
        points = trace(server, session_id, text="true", **params)["points"]
        assert points and all(p["text"] == TEXT[p["from"] : p["to"]] for p in points)
        assert all("text" not in p for p in trace(server, session_id, **params)["points"])
    bare = server.session(retain_input=False)
    server.document(bare, TEXT)
    refused = server.http.get(f"/v1/sessions/{bare}/surprise", params={"text": "true"})
    assert "doesn't retain" in check(refused, 400, "invalid_request", "text")["message"]


def test_a_part_by_token_and_by_layer(server: RunningServer) -> None:
    session_id = server.session()
    server.document(session_id, TEXT)
    used = server.http.get("/v1/usage").json()["tokens"]
    found = trace(server, session_id, **{"from": 13, "to": 21, "resolution": 1, "layers": "true"})
    assert server.http.get("/v1/usage").json()["tokens"] == used + 8, "what is computed is charged"
    assert [p["surprise"] for p in found["points"]] == [float(byte) for byte in TEXT[13:21].encode()]
    assert found["points"][0] == {
        "from": 13,
        "to": 14,
        "surprise": float(ord(TEXT[13])),
        "momentary": float(ord(TEXT[13])),
        "moved": None,
        "gain": None,
        "layers": {
            "surprise": [float(ord(TEXT[13]))],
            "momentary": [float(ord(TEXT[13]))],
            "moved": [None],
            "gain": [None],
        },
    }
    found = trace(server, session_id, resolution=100)
    assert found["resolution"] == 64 and [p["to"] for p in found["points"]][:2] == [64, 128]


def test_an_older_version(server: RunningServer) -> None:
    session_id = server.session()
    server.document(session_id, TEXT)
    before = trace(server, session_id)
    server.document(session_id, TEXT)
    assert trace(server, session_id)["to"] == 2 * len(TEXT)
    assert trace(server, session_id, version=before["version"]) == before


def test_what_cannot_be_answered(server: RunningServer) -> None:
    session_id = server.session()
    server.document(session_id, "x" * 5000)
    url = f"/v1/sessions/{session_id}/surprise"
    for params, param in (
        ({"from": 5001}, "from"),
        ({"from": -1}, "from"),
        ({"from": 2, "to": 1}, "from"),
        ({"to": "soon"}, "to"),
        ({"resolution": 0}, "resolution"),
        ({"resolution": 1}, "resolution"),
        ({"resolution": 2}, "to"),
    ):
        check(server.http.get(url, params=params), 400, "invalid_request", param)
    check(server.http.get(url, params={"version": 99}), 404, "version_not_found")
    check(server.http.get("/v1/sessions/sess_none/surprise"), 404, "session_not_found")
    forgetful = server.session(retain_input=False)
    server.document(forgetful, TEXT)
    url = f"/v1/sessions/{forgetful}/surprise"
    check(server.http.get(url, params={"resolution": 1}), 400, "invalid_request", "resolution")
    assert server.http.get(url).json()["points"]


def test_a_session_of_another_tenant_is_not_found(make_server: MakeServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    hashes = {hashlib.sha256(key.encode()).hexdigest(): tenant for key, tenant in (("k1", "a"), ("k2", "b"))}
    keys.write_text(json.dumps(hashes))
    server = make_server(keys_file=keys)
    mine, other = ({"Authorization": f"Bearer {key}"} for key in ("k1", "k2"))
    session_id = server.http.post("/v1/sessions", headers=mine).json()["id"]
    url = f"/v1/sessions/{session_id}/surprise"
    assert server.http.get(url, headers=mine).json()["points"] == []
    check(server.http.get(url, headers=other), 404, "session_not_found")
    check(server.http.get(url), 401, "invalid_api_key")
