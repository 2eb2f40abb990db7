"""Sessions over HTTP: life, versions, forks and rewinds, retries, conditions, state files and events."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

from .conftest import MakeServer
from .running import RunningServer
from .test_errors import check


def turn(server: RunningServer, session_id: str, **extra: Any) -> httpx.Response:
    headers = extra.pop("headers", {})
    body = {"prompt": "sky:", "max_tokens": 6, "temperature": 0, "session_id": session_id, **extra}
    return server.http.post("/v1/completions", json=body, headers=headers)


def test_make_read_change_list_delete(make_server: MakeServer) -> None:
    server = make_server()
    made = server.http.post("/v1/sessions", json={"metadata": {"a": 1}, "ttl_seconds": 1000, "x": 1})
    info = made.json()
    assert made.status_code == 201 and made.headers["location"] == f"/v1/sessions/{info['id']}"
    assert made.headers["etag"] == f'"{info["version"]}"'
    assert made.headers["x-mnemosyne-ignored-fields"] == "x"
    assert info["tokens_seen"] == 0 and info["metadata"] == {"a": 1} and info["model"] == "scripted"
    url = made.headers["location"]
    assert server.http.get(url).json()["expires_at"] == info["expires_at"] > info["created_at"]
    changed = server.http.patch(url, json={"ttl_seconds": None, "metadata": {"b": 2}}).json()
    assert changed["expires_at"] is None and changed["metadata"] == {"b": 2}
    assert server.http.patch(url, json={}).json()["metadata"] == {"b": 2}

    others = [server.session() for _ in range(2)]
    first = server.http.get("/v1/sessions", params={"limit": 2}).json()
    assert [s["id"] for s in first["data"]] == [info["id"], others[0]] and first["has_more"]
    rest = server.http.get("/v1/sessions", params={"limit": 2, "after": others[0]}).json()
    assert [s["id"] for s in rest["data"]] == [others[1]] and not rest["has_more"]

    receipt = server.http.delete(url, params={"erase": "true"})
    assert receipt.status_code == 200 and receipt.json()["session_ids"] == [info["id"]]
    check(server.http.get(url), 404, "session_not_found")
    check(server.http.delete(url), 404, "session_not_found")


def test_a_session_needs_no_body(server: RunningServer) -> None:
    assert server.http.post("/v1/sessions").status_code == 201


def test_versions_fork_and_rewind(server: RunningServer) -> None:
    session_id = server.session()
    url = f"/v1/sessions/{session_id}"
    first = turn(server, session_id).json()["session"]
    named = server.http.post(f"{url}/versions", json={"name": "good"})
    assert named.status_code == 201 and named.json()["name"] == "good"
    second = turn(server, session_id).json()["session"]
    assert second["version"] > first["version"] and second["tokens_seen"] == 20
    versions = server.http.get(f"{url}/versions").json()["data"]
    assert [v["tokens_seen"] for v in versions if v["made_by"] == "turn"] == [10, 20]

    fork = server.http.post(f"{url}/fork", json={"version": first["version"]})
    assert fork.status_code == 201 and fork.json()["tokens_seen"] == 10
    assert fork.json()["parent"] == {"session_id": session_id, "version": first["version"]}
    assert server.http.post(f"{url}/fork").json()["tokens_seen"] == 20

    back = server.http.post(f"{url}/rewind", json={"version": first["version"]})
    assert back.status_code == 200 and back.json()["tokens_seen"] == 10
    assert back.json()["version"] > second["version"] and back.headers["etag"]
    check(server.http.post(f"{url}/rewind", json={"version": 999}), 404, "version_not_found")
    both = server.http.post(f"{url}/rewind", json={"version": 1, "tokens_seen": 3})
    assert both.status_code == 400
    gone = server.http.delete(f"{url}/versions/{second['version']}")
    assert gone.status_code == 204 and gone.content == b""
    newest = server.http.delete(f"{url}/versions/{back.json()['version']}")
    assert newest.status_code == 400


def test_a_question_to_an_older_version_leaves_the_newest_alone(server: RunningServer) -> None:
    session_id = server.session()
    first = turn(server, session_id).json()["session"]
    second = turn(server, session_id).json()["session"]
    old = turn(server, session_id, learn=False, version=first["version"])
    assert old.status_code == 200 and old.json()["choices"][0]["text"] == " blue\n"
    assert server.http.get(f"/v1/sessions/{session_id}").json()["version"] == second["version"]
    missing = turn(server, session_id, learn=False, version=999)
    check(missing, 404, "version_not_found")


def test_if_match(server: RunningServer) -> None:
    session_id = server.session()
    tag = server.http.get(f"/v1/sessions/{session_id}").headers["etag"]
    after = turn(server, session_id, headers={"If-Match": tag})
    assert after.status_code == 200
    stale = turn(server, session_id, headers={"If-Match": tag})
    check(stale, 412, "version_mismatch")
    assert stale.headers.get("etag", after.headers["etag"]) == after.headers["etag"]
    check(turn(server, session_id, headers={"If-Match": "what"}), 400, "invalid_request", "if-match")
    assert turn(server, session_id, headers={"If-Match": "*"}).status_code == 200


def test_a_retry_under_its_key_is_learned_once(server: RunningServer) -> None:
    key = {"Idempotency-Key": "turn-1"}
    session_id = server.session()
    first = turn(server, session_id, headers=key)
    again = turn(server, session_id, headers=key)
    for field in ("choices", "session"):
        assert first.json()[field] == again.json()[field]
    assert server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] == 10
    check(turn(server, session_id, prompt="sea:", headers=key), 422, "idempotency_mismatch")
    made = [server.http.post("/v1/sessions", json={}, headers={"Idempotency-Key": "s"}).json() for _ in "ab"]
    assert made[0]["id"] == made[1]["id"]
    forks = [
        server.http.post(f"/v1/sessions/{session_id}/fork", headers={"Idempotency-Key": "f"}).json()["id"]
        for _ in "ab"
    ]
    assert forks[0] == forks[1]


def test_one_writer_at_a_time_and_readers_beside_it(make_server: MakeServer) -> None:
    server = make_server()
    session_id = server.session()
    turn(server, session_id)
    server.model.delay = 0.03
    answers: list[httpx.Response] = []
    writer = threading.Thread(target=lambda: answers.append(turn(server, session_id, max_tokens=40)))
    writer.start()
    server.until_gauge("num_requests_running", 1)
    busy = turn(server, session_id)
    check(busy, 409, "session_busy")
    assert int(busy.headers["retry-after"]) >= 1
    assert turn(server, session_id, learn=False, max_tokens=1).status_code == 200
    writer.join(20)
    assert answers[0].status_code == 200


def test_cancel_stops_the_turn(make_server: MakeServer) -> None:
    server = make_server()
    session_id = server.session()
    server.model.delay = 0.03
    answers: list[httpx.Response] = []
    writer = threading.Thread(target=lambda: answers.append(turn(server, session_id, max_tokens=4000)))
    writer.start()
    server.until_gauge("num_requests_running", 1)
    assert server.http.post(f"/v1/sessions/{session_id}/cancel").json() == {"cancelled": 1}
    writer.join(20)
    check(answers[0], 409, "cancelled")
    assert server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] == 0


def test_the_transcript(server: RunningServer) -> None:
    session_id = server.session()
    server.document(session_id, "a text")
    turn(server, session_id)
    entries = server.http.get(f"/v1/sessions/{session_id}/transcript").json()["data"]
    assert [(e["kind"], e["text"]) for e in entries] == [
        ("document", "a text"),
        ("input", "sky:"),
        ("generated", " blue\n"),
    ]


def test_state_goes_out_and_into_another_server(make_server: MakeServer) -> None:
    server, other = make_server(), make_server()
    session_id, there = server.session(), other.session()
    server.document(session_id, "something to remember " * 5)
    state = server.http.get(f"/v1/sessions/{session_id}/state")
    assert state.status_code == 200 and session_id in state.headers["content-disposition"]
    url = f"/v1/sessions/{there}/state"
    stale = other.http.put(url, content=state.content, headers={"If-Match": '"99"'})
    check(stale, 412, "version_mismatch")
    info = other.http.put(url, content=state.content)
    assert info.status_code == 200, info.text
    assert info.json()["tokens_seen"] == 110
    assert other.http.get(url).content == state.content
    check(other.http.put(url, content=b""), 400, "invalid_request")
    check(other.http.put(url, content=state.content[:-4]), 400, "snapshot_corrupt")
    foreign = state.content.replace(b"scripted", b"somebody")
    check(other.http.put(url, content=foreign), 422, "state_incompatible")
    assert server.http.get(f"/v1/sessions/{session_id}/state", params={"log": "true"}).content[:2] == b"PK"


def test_events_tell_of_reading_and_can_be_resumed(server: RunningServer) -> None:
    session_id = server.session()
    url = f"/v1/sessions/{session_id}/events"
    with server.http.stream("GET", url, headers={"Last-Event-ID": "0"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        server.document(session_id, "words " * 40)
        seen: list[dict[str, str]] = [{}]
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                seen[-1][name] = value
            elif seen[-1]:
                if seen[-1]["event"] == "version":
                    break
                seen.append({})
    kinds = {event["event"] for event in seen}
    assert {"progress", "surprise", "version"} <= kinds
    ids = [int(event["id"]) for event in seen]
    assert ids == sorted(ids) and all("at" in json.loads(event["data"]) for event in seen)
    with server.http.stream("GET", url, headers={"Last-Event-ID": str(ids[-2])}) as answer:
        first = next(line for line in answer.iter_lines() if line.startswith("id: "))
    assert first == f"id: {ids[-1]}"
    check(server.http.get("/v1/sessions/unknown/events"), 404, "session_not_found")
