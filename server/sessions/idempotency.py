"""Keys of requests that may be repeated. Owns their scope and the comparison; knows no journal."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from mnemosyne.engine.errors import IdempotencyMismatch
from mnemosyne.server.sessions.lineage import REPLY_SECONDS
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.records import Reply
from mnemosyne.server.sessions.views import Idempotency


def scope(tenant: str, asked: Idempotency) -> str:
    """A name for (tenant, route, key) that says nothing about them."""
    return hashlib.sha256(json.dumps([tenant, asked.route, asked.key]).encode()).hexdigest()


def same_body(first: str, asked: Idempotency) -> None:
    """Raises IdempotencyMismatch unless the first request's body was the same."""
    if first != asked.body_hash:
        raise IdempotencyMismatch("this Idempotency-Key was used with another body")


async def first_answer(live: Live, tenant: str, asked: Idempotency | None) -> dict[str, Any] | None:
    """What the first request under this key was answered; None if there was none in the last 24 hours."""
    if asked is None:
        return None
    key = scope(tenant, asked)
    kept = live.session.replies.get(key)
    if kept is None or kept.at + REPLY_SECONDS < time.time():
        return None
    same_body(kept.body_hash, asked)
    reply = await live.reply(key)
    return reply.payload if reply is not None else None


def reply(tenant: str, asked: Idempotency | None, payload: dict[str, Any]) -> Reply | None:
    """What goes into the journal with the change."""
    return Reply(scope(tenant, asked), asked.body_hash, payload) if asked is not None else None
