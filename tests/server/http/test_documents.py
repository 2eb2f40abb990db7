"""Documents over HTTP: whole or in pieces, resumed where they stopped, refused when they aren't text."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import pytest

from .conftest import MakeServer
from .running import RunningServer
from .test_errors import check

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 20


def announce(server: RunningServer, session_id: str, **body: Any) -> str:
    answer = server.http.post(f"/v1/sessions/{session_id}/documents", json={"name": "text.txt", **body})
    assert answer.status_code == 201, answer.text
    assert answer.headers["upload-offset"] == "0"
    return answer.headers["location"]


def put(
    server: RunningServer, url: str, offset: int, data: bytes, last: bool = False, **headers: str
) -> httpx.Response:
    told = {"Upload-Offset": str(offset), "Content-Type": "application/octet-stream", **headers}
    if last:
        told["Upload-Complete"] = "?1"
    return server.http.patch(url, content=data, headers=told)


def test_pieces_that_cut_characters_end_as_the_whole_text(server: RunningServer) -> None:
    raw = TEXT.encode()
    states = []
    for size in (len(raw), 61):
        session_id = server.session()
        url = announce(server, session_id, length=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        for offset in range(0, len(raw), size):
            piece = raw[offset : offset + size]
            answer = put(server, url, offset, piece, last=offset + size >= len(raw))
            assert answer.status_code == 204 and answer.content == b""
            assert answer.headers["upload-offset"] == str(offset + len(piece))
        info = server.finished(session_id, url.rsplit("/", 1)[1])
        assert info["status"] == "absorbed" and info["tokens_absorbed"] == len(raw), info
        states.append(server.http.get(f"/v1/sessions/{session_id}/state").content)
    assert states[0] == states[1]


def test_an_upload_goes_on_where_it_stopped(server: RunningServer) -> None:
    session_id = server.session()
    url = announce(server, session_id)
    assert put(server, url, 0, b"first ").status_code == 204
    wrong = put(server, url, 3, b"second", last=True)
    check(wrong, 409, "offset_mismatch")
    assert wrong.headers["upload-offset"] == "6"
    repeat = put(server, url, 0, b"first ")
    check(repeat, 409, "offset_mismatch")
    head = server.http.head(url)
    assert head.status_code == 200 and head.content == b""
    assert head.headers["upload-offset"] == "6" and head.headers["upload-complete"] == "?0"
    assert put(server, url, 6, b"second", last=True).status_code == 204
    info = server.finished(session_id, url.rsplit("/", 1)[1])
    assert (info["bytes_received"], info["bytes_absorbed"], info["tokens_absorbed"]) == (12, 12, 12)
    assert server.http.head(url).headers["upload-complete"] == "?1"
    listed = server.http.get(f"/v1/sessions/{session_id}/documents").json()["data"]
    assert [d["id"] for d in listed] == [info["id"]]


def test_text_or_tokens_at_once(server: RunningServer) -> None:
    session_id = server.session()
    assert server.document(session_id, "short")["tokens_absorbed"] == 5
    url = f"/v1/sessions/{session_id}/documents"
    made = server.http.post(url, json={"name": "ids", "tokens": [1, 2, 3]})
    assert server.finished(session_id, made.json()["id"])["tokens_absorbed"] == 3
    assert server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] == 8
    both = server.http.post(url, json={"name": "both", "text": "a", "tokens": [1]})
    assert both.status_code == 400


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"fine until \xff here", {}),
        ("é".encode()[:1], {}),
        (b"text", {"length": 5}),
        (b"text", {"sha256": "0" * 64}),
    ],
)
def test_what_is_not_the_text_announced_is_rejected_and_changes_nothing(
    server: RunningServer, raw: bytes, body: dict[str, Any]
) -> None:
    session_id = server.session()
    server.document(session_id, "before")
    url = announce(server, session_id, **body)
    error = check(put(server, url, 0, raw, last=True), 400, "document_rejected")
    info = server.http.get(url).json()
    assert info["status"] == "rejected" and info["error"]["message"] == error["message"]
    assert server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] == 6
    assert server.document(session_id, "after")["status"] == "absorbed"


def test_a_document_that_is_too_large_by_its_length_or_by_what_comes(make_server: MakeServer) -> None:
    server = make_server(max_document_bytes=100)
    session_id = server.session()
    announced = server.http.post(
        f"/v1/sessions/{session_id}/documents", json={"name": "large", "length": 101}
    )
    check(announced, 413, "document_too_large", "length")
    url = announce(server, session_id)
    assert put(server, url, 0, b"a" * 60).status_code == 204
    check(put(server, url, 60, b"a" * 41), 413, "document_too_large", "length")
    assert server.http.head(url).headers["upload-offset"] == "60"
    assert put(server, url, 60, b"a" * 40, last=True).status_code == 204


def test_what_is_not_text_by_its_type(server: RunningServer) -> None:
    session_id = server.session()
    pdf = {"name": "paper.pdf", "content_type": "application/pdf"}
    check(
        server.http.post(f"/v1/sessions/{session_id}/documents", json=pdf),
        415,
        "unsupported_media_type",
        "content_type",
    )
    url = announce(server, session_id, content_type="text/markdown; charset=utf-8")
    check(put(server, url, 0, b"{}", **{"Content-Type": "application/json"}), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "headers",
    [{}, {"Upload-Offset": "x"}, {"Upload-Offset": "-1"}, {"Upload-Offset": "0", "Upload-Complete": "1"}],
)
def test_upload_headers_are_checked(server: RunningServer, headers: dict[str, str]) -> None:
    url = announce(server, server.session())
    answer = server.http.patch(url, content=b"a", headers=headers)
    error = check(answer, 400, "invalid_request", answer.json()["error"]["param"])
    assert error["param"] in ("upload-offset", "upload-complete")


def test_unknown_documents(server: RunningServer) -> None:
    url = f"/v1/sessions/{server.session()}/documents/none"
    check(server.http.get(url), 404, "document_not_found")
    check(put(server, url, 0, b"a"), 404, "document_not_found")
    check(server.http.delete(url), 404, "document_not_found")
    assert server.http.head(url).status_code == 404


def test_a_document_is_cancelled(make_server: MakeServer) -> None:
    server = make_server()
    session_id = server.session()
    url = announce(server, session_id)
    put(server, url, 0, b"half a te")
    answer = server.http.delete(url)
    assert answer.status_code == 200 and answer.json()["status"] == "cancelled"
    assert server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] == 0


def test_a_turn_waits_for_no_document(make_server: MakeServer) -> None:
    server = make_server()
    session_id = server.session()
    server.document(session_id, "before")
    server.model.gate.clear()
    url = f"/v1/sessions/{session_id}/documents"
    made = server.http.post(url, json={"name": "long", "text": TEXT})
    body = {"prompt": "sky:", "session_id": session_id}
    busy = server.http.post("/v1/completions", json=body)
    check(busy, 409, "session_busy")
    assert busy.headers["retry-after"]
    server.model.gate.set()
    assert server.finished(session_id, made.json()["id"])["status"] == "absorbed"
    assert server.http.post("/v1/completions", json=body).status_code == 200
