"""A small synchronous client of the HTTP interface, for the commands, the demo and the benches.

Owns the requests, resuming an upload, and turning an error envelope into one exception; knows no terminal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
PIECE_BYTES = 256 * 1024
_UPLOAD_ATTEMPTS = 5


class ApiError(Exception):
    """The server answered with an error, or couldn't be reached (``status`` 0)."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


@dataclass
class Answer:
    """What came back for one question; the fields after ``text`` are complete once the stream has ended."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    session: dict[str, Any] = field(default_factory=dict)


def _raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        error = response.json()["error"]
        code, message = str(error.get("code") or error.get("type") or ""), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "", response.text[:200] or response.reason_phrase
    raise ApiError(response.status_code, code, message)


class Client:
    """One server. Raises ApiError for an answer that isn't a success, and when there is none."""

    def __init__(
        self, url: str = DEFAULT_URL, key: str | None = None, timeout_seconds: float = 600.0
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_seconds, trust_env=False)
        self.url = url

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request and its whole answer; ``options`` are httpx's."""
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise ApiError(0, "unreachable", f"no answer from {self.url}: {error}") from error
        _raise_for(response)
        return response

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.call(method, path, **options).json()
        return answer

    def models(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._json("GET", "/v1/models")["data"]
        return found

    def create_session(self, **body: Any) -> dict[str, Any]:
        return self._json("POST", "/v1/sessions", json=body)

    def session(self, session_id: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/sessions/{session_id}")

    def sessions(self) -> Iterator[dict[str, Any]]:
        """Every session of this key's tenant, page by page."""
        after: str | None = None
        while True:
            page = self._json(
                "GET", "/v1/sessions", params={"limit": 100} | ({"after": after} if after else {})
            )
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def surprise(self, session_id: str, **params: Any) -> dict[str, Any]:
        """The trace; ``params`` are the route's, those that are None not given."""
        given = {name: value for name, value in params.items() if value is not None}
        return self._json("GET", f"/v1/sessions/{session_id}/surprise", params=given)

    def delete_session(self, session_id: str, erase: bool = False) -> None:
        self.call("DELETE", f"/v1/sessions/{session_id}", params={"erase": "true"} if erase else None)

    def create_document(self, session_id: str, name: str, length: int | None = None) -> dict[str, Any]:
        body = {"name": name} | ({"length": length} if length is not None else {})
        return self._json("POST", f"/v1/sessions/{session_id}/documents", json=body)

    def document(self, session_id: str, document_id: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/sessions/{session_id}/documents/{document_id}")

    def upload(
        self,
        session_id: str,
        document_id: str,
        source: BinaryIO,
        length: int,
        on_bytes: Callable[[int], None] | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """Send ``length`` bytes of a seekable ``source`` in pieces; return when all are acknowledged.

        After a lost connection or a wrong offset it asks the server where to go on: no byte is learned twice.
        """
        path = f"/v1/sessions/{session_id}/documents/{document_id}"
        offset = attempts = 0
        complete = False
        while not complete:
            source.seek(offset)
            piece = source.read(min(piece_bytes, length - offset))
            complete = offset + len(piece) >= length
            headers = {"Upload-Offset": str(offset), "Content-Type": "application/octet-stream"}
            if complete:
                headers["Upload-Complete"] = "?1"
            try:
                answer = self.call("PATCH", path, content=piece, headers=headers)
                offset, attempts = int(answer.headers["Upload-Offset"]), 0
            except ApiError as error:
                attempts += 1
                resumable = error.status in (0, 429, 503) or error.code == "offset_mismatch"
                if not resumable or attempts == _UPLOAD_ATTEMPTS:
                    raise
                time.sleep(0.2 * 2**attempts)
                head = self.call("HEAD", path)
                offset = int(head.headers["Upload-Offset"])
                complete = head.headers.get("Upload-Complete") == "?1"
            if on_bytes is not None:
                on_bytes(offset)

    def ask(
        self,
        question: str,
        session_id: str | None = None,
        model: str | None = None,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Answer:
        """One streamed chat turn; ``options`` go into the body (``learn``, ``temperature``, ...)."""
        body: dict[str, Any] = {
            "model": model or self.models()[0]["id"],
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "stream_options": {"include_usage": True},
        } | options
        if session_id is not None:
            body["session_id"] = session_id
        answer = Answer()
        for chunk in self._stream("/v1/chat/completions", body):
            answer.usage = chunk.get("usage") or answer.usage
            answer.session = chunk.get("session") or answer.session
            for choice in chunk.get("choices", []):
                answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                text = choice.get("delta", {}).get("content")
                if text:
                    answer.text += text
                    if on_text is not None:
                        on_text(text)
        return answer

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The messages of a stream up to ``[DONE]``."""
        try:
            with self._http.stream("POST", path, json=body) as response:
                _raise_for(response)
                for line in response.iter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        return
                    message = json.loads(line.removeprefix("data: "))
                    if "error" in message:
                        error = message["error"]
                        raise ApiError(
                            int(response.status_code), str(error.get("code")), str(error["message"])
                        )
                    yield message
        except httpx.HTTPError as error:
            raise ApiError(0, "unreachable", f"the stream from {self.url} broke: {error}") from error
        raise ApiError(0, "incomplete", "the stream ended before [DONE]")

    def export_state(self, session_id: str, target: Path, log: bool = False) -> int:
        """Write the session's state to ``target``, whole or not at all, and return its bytes."""
        part = target.with_name(target.name + ".part")
        path, params = f"/v1/sessions/{session_id}/state", {"log": "true"} if log else None
        try:
            with self._http.stream("GET", path, params=params) as response:
                _raise_for(response)
                with part.open("wb") as file:
                    for piece in response.iter_bytes():
                        file.write(piece)
            part.replace(target)
        except httpx.HTTPError as error:
            raise ApiError(0, "unreachable", f"the download from {self.url} broke: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        return target.stat().st_size

    def import_state(self, session_id: str, source: Path) -> dict[str, Any]:
        """Make a new version of the session from an exported file, unless the session has moved meanwhile."""
        path = f"/v1/sessions/{session_id}"
        etag = self.call("GET", path).headers["ETag"]
        headers = {"If-Match": etag, "Content-Type": "application/octet-stream"}
        self.call("PUT", f"{path}/state", content=source.read_bytes(), headers=headers)
        return self.session(session_id)
