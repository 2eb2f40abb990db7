"""What a session is, in one view. Knows where each of its facts comes from; changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from mnemosyne.server.sessions.core import Core
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.views import ParentInfo, SessionInfo


async def overview(core: Core, live: Live) -> SessionInfo:
    """The session now; while a document is being read, with the tokens read of it."""
    session = live.session
    created, newest, parent = session.created, session.newest, session.created.parent
    same_weights = created.fingerprint == core.engine.info.model_fingerprint
    held = not newest.tokens or await core.states.holds(live, session.newest_commit)
    return SessionInfo(
        id=live.id,
        model=created.model,
        version=newest.number,
        tokens_seen=session.newest_commit.tokens,
        state_bytes=core.engine.info.state_bytes,
        stored_bytes=await asyncio.to_thread(core.store.stored_bytes, live.id),
        tier="device" if held else "store",
        parent=ParentInfo(session_id=parent.point.session_id, version=parent.version) if parent else None,
        fingerprint=created.fingerprint,
        created_at=created.at,
        expires_at=session.expires_at,
        retain_input=created.retain_input,
        metadata=session.metadata,
        gain=live.gain,
        health=(live.trouble or "ok") if same_weights else "incompatible",
    )


def given_before(payload: dict[str, Any]) -> SessionInfo:
    """A view as it was kept under an idempotency key."""
    parent = ParentInfo(**payload["parent"]) if payload["parent"] else None
    return SessionInfo(**{**payload, "parent": parent})
