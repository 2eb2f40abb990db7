"""Answers made, kept and given again. Knows no engine and no store."""

from __future__ import annotations

from typing import Any

from mnemosyne.engine.messages import FinishReason, Token
from mnemosyne.server.sessions.answertext import AnswerText
from mnemosyne.server.sessions.views import Answer, SessionUsage, TurnRequest


def usage(session_id: str, version: int, tokens_seen: int, base_tokens: int, recomputed: int) -> SessionUsage:
    """What a turn on a base of ``base_tokens`` tokens did, ``recomputed`` of which were replayed for it."""
    recomputed = min(recomputed, base_tokens)
    return SessionUsage(
        id=session_id,
        version=version,
        tokens_seen=tokens_seen,
        reused_tokens=base_tokens - recomputed,
        recomputed_tokens=recomputed,
    )


def answered(
    request: TurnRequest, text: AnswerText, reason: FinishReason, emitted: int, session: SessionUsage | None
) -> Answer:
    """The end of a turn that emitted ``emitted`` tokens."""
    return Answer(
        text=text.text,
        finish_reason=reason,
        prompt_tokens=len(request.prompt),
        completion_tokens=emitted,
        tokens=tuple(text.tokens),
        seed=request.sampling.seed,
        session=session,
    )


def given_before(payload: dict[str, Any]) -> Answer:
    """An answer as it was kept, to be given again."""
    tokens = tuple(
        Token(**{**token, "top_logprobs": tuple((int(i), float(p)) for i, p in token["top_logprobs"])})
        for token in payload["tokens"]
    )
    session = SessionUsage(**payload["session"]) if payload["session"] is not None else None
    return Answer(**{**payload, "tokens": tokens, "session": session, "repeated": True})
