"""Server-sent events on the wire. Owns framing and keep-alive; knows no route and no message's meaning.

The keep-alive is a bare blank line, sent by wall clock: unlike a comment it disturbs none of the clients that
read one event per network read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from mnemosyne.server.relay import Relay, Silence

KEEP_ALIVE = b"\n\n"
DONE = b"data: [DONE]\n\n"
DESCRIPTION: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "required": ["data"],
            "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
        }
    }
}
"""A stream in the OpenAPI document: the fields of one event."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def data(message: Any) -> bytes:
    """One event without a name: a pydantic model or plain data, as JSON on one line."""
    return b"data: " + to_json(message) + b"\n\n"


def event(name: str, message: Any, event_id: int) -> bytes:
    """One named event with the id that ``Last-Event-ID`` gives back."""
    return f"id: {event_id}\nevent: {name}\n".encode() + data(message)


class EventStream(StreamingResponse):
    """A 200 whose headers go out before the first event. The relay is closed when the client is gone or
    served."""

    media_type = "text/event-stream"

    def __init__(self, relay: Relay[bytes], interval: float, headers: dict[str, str] | None = None) -> None:
        self._relay = relay
        super().__init__(_lively(relay, interval), headers={**HEADERS, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._relay.close()


async def _lively(relay: Relay[bytes], interval: float) -> AsyncIterator[bytes]:
    while True:
        try:
            piece = await relay.next(interval if interval > 0 else None)
        except StopAsyncIteration:
            return
        yield KEEP_ALIVE if isinstance(piece, Silence) else piece
