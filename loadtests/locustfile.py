"""A scenario for locust: every user opens a session, lets it read, and then streams answers from it.

Runs in locust's process alone (importing locust patches sockets and threads); knows no module of Mnemosyne.
``loadtests/README.md`` has the command and the formulas of what it reports.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from locust import HttpUser, between, events, task

PIECE_BYTES = 64 * 1024
DOCUMENT_BYTES = 128 * 1024
ANSWER_TOKENS = 32
WORDS = "the ship crossed a quiet harbour while old sailors told stories about storms and lamps".split()


def report(name: str, milliseconds: float, exception: Exception | None = None) -> None:
    """One sample of a measure that isn't the time of a whole request."""
    events.request.fire(
        request_type="SSE",
        name=name,
        response_time=milliseconds,
        response_length=0,
        exception=exception,
        context={},
    )


def some_text(size: int) -> bytes:
    """``size`` bytes of words, different at each call so that nothing can be cached."""
    rng = random.Random()
    return " ".join(rng.choice(WORDS) for _ in range(size)).encode()[:size]


class Reader(HttpUser):
    """One client with one session."""

    wait_time = between(0.1, 0.5)

    def on_start(self) -> None:
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]
        self.session_id = self.client.post("/v1/sessions", json={}).json()["id"]
        self.read_document()

    def on_stop(self) -> None:
        self.client.delete(f"/v1/sessions/{self.session_id}", name="/v1/sessions/{id}")

    def read_document(self) -> None:
        """Upload one document in pieces and wait until the session has read it."""
        data = some_text(DOCUMENT_BYTES)
        documents = f"/v1/sessions/{self.session_id}/documents"
        body = {"name": "load.txt", "length": len(data)}
        document = self.client.post(documents, json=body, name="/v1/sessions/{id}/documents").json()
        path = f"{documents}/{document['id']}"
        for offset in range(0, len(data), PIECE_BYTES):
            last = offset + PIECE_BYTES >= len(data)
            headers = {"Upload-Offset": str(offset), "Content-Type": "application/octet-stream"}
            headers |= {"Upload-Complete": "?1"} if last else {}
            piece = data[offset : offset + PIECE_BYTES]
            self.client.patch(path, data=piece, headers=headers, name="/v1/sessions/{id}/documents/{doc}")
        began = time.perf_counter()
        while document["status"] in ("receiving", "queued", "absorbing"):
            time.sleep(0.2)
            document = self.client.get(path, name="/v1/sessions/{id}/documents/{doc}").json()
        absorbed = document["status"] == "absorbed"
        failure = None if absorbed else RuntimeError(f"document {document['status']}: {document['error']}")
        report("document read", (time.perf_counter() - began) * 1000, failure)

    @task(10)
    def ask(self) -> None:
        """Stream one answer that leaves no trace, and time its tokens."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "user", "content": f"What is the colour of ship {random.randrange(1000)}?"}
            ],
            "session_id": self.session_id,
            "learn": False,
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began = time.perf_counter()
        arrivals: list[float] = []
        tokens = 0
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
                return
            complete = False
            for line in response.iter_lines():
                if line == b"data: [DONE]":
                    complete = True
                    break
                if not line.startswith(b"data: "):
                    continue
                message = json.loads(line[len(b"data: ") :])
                if "error" in message:
                    response.failure(message["error"]["message"])
                    return
                if any(choice["delta"].get("content") for choice in message.get("choices", [])):
                    arrivals.append(time.perf_counter())
                tokens = (message.get("usage") or {}).get("completion_tokens", tokens)
            if not complete:
                response.failure("the stream ended before [DONE]")
                return
            response.success()
        if arrivals:
            report("TTFT", (arrivals[0] - began) * 1000)
        if tokens > 1 and len(arrivals) > 1:
            report("ITL", (arrivals[-1] - arrivals[0]) * 1000 / (tokens - 1))

    @task(1)
    def read_more(self) -> None:
        self.read_document()
