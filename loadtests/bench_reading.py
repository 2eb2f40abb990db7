"""A document read through the real server, timed to its ``absorbed`` event; and texts to read.

The event stream says when a document has been read, so nothing polls while the server works.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from mnemosyne.server.cli.client import ApiError, Client
from mnemosyne.server.sessions.tokens import TextTokenizer
from mnemosyne.training.facts import demo_text

BASE_BYTES = 600 * 1024


@dataclass(frozen=True)
class Reading:
    tokens: int
    seconds: float
    """From before the document was announced to its ``absorbed`` event: upload, journal and tokenizer too."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def read(client: Client, session_id: str, text: str) -> Reading:
    """Let a session read a text. Raises ApiError where the server rejects it or goes away."""
    data = text.encode()
    began = time.perf_counter()
    document = client.create_document(session_id, "bench.txt", len(data))
    client.upload(session_id, document["id"], io.BytesIO(data), len(data))
    _wait(client, session_id, document["id"])
    seconds = time.perf_counter() - began
    return Reading(int(client.document(session_id, document["id"])["tokens_absorbed"]), seconds)


def _wait(client: Client, session_id: str, document_id: str) -> None:
    url = f"{client.url}/v1/sessions/{session_id}/events"
    try:
        with httpx.stream("GET", url, params={"after": 0}, timeout=120.0, trust_env=False) as response:
            for line in response.iter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                status = event.get("status") if event.get("document") == document_id else None
                if status == "absorbed":
                    return
                if status in ("rejected", "cancelled"):
                    raise ApiError(0, status, f"document {document_id} was {status}")
    except httpx.HTTPError as error:
        raise ApiError(0, "unreachable", f"the events of {session_id} broke: {error}") from error
    raise ApiError(0, "incomplete", f"the events of {session_id} ended before the document was read")


def long_text(tokenizer: TextTokenizer, tokens: int) -> str:
    """About ``tokens`` tokens: Python's manuals again and again, their paragraphs in another order each
    time."""
    return "".join(_paragraphs(tokenizer, tokens))


def windows(tokenizer: TextTokenizer, count: int, tokens: int) -> list[str]:
    """``count`` different texts of about ``tokens`` tokens each."""
    text = long_text(tokenizer, count * tokens)
    size = len(text) // count
    return [text[i * size : (i + 1) * size] for i in range(count)]


def _paragraphs(tokenizer: TextTokenizer, tokens: int) -> Iterator[str]:
    paragraphs = demo_text(BASE_BYTES).split("\n\n")
    lengths = [len(tokenizer.encode(paragraph)) + 1 for paragraph in paragraphs]
    order, left, rng = list(range(len(paragraphs))), tokens, random.Random(0)
    while left > 0:
        for i in order:
            yield paragraphs[i] + "\n\n"
            left -= lengths[i]
            if left <= 0:
                return
        rng.shuffle(order)
