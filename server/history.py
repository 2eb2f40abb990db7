"""Resent conversations. Owns finding where a request's messages go on from what a session has read.

Stock chat clients send the whole conversation each time. Its answered part is recognised, never learned
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mnemosyne.engine.errors import RequestError
from mnemosyne.server.prompt import ChatTemplate

Message = tuple[str, str]
"""Role and text."""


@dataclass(frozen=True)
class Turn:
    """What was asked, as it was read, and what was answered."""

    prompt: str
    answer: str


def past_turns(transcript: Sequence[dict[str, Any]]) -> list[Turn]:
    """The answered turns of a session's transcript; documents between them belong to none."""
    turns = []
    for _, group in groupby(transcript, key=lambda entry: entry["version"]):
        entries = list(group)
        kinds = [entry["kind"] for entry in entries]
        if "generated" in kinds:
            answered = kinds.index("generated")
            prompt = "".join(entry["text"] for entry in entries[:answered] if entry["kind"] == "input")
            turns.append(Turn(prompt, "".join(e["text"] for e in entries if e["kind"] == "generated")))
    return turns


def split_resent(messages: Sequence[Message], turns: Sequence[Turn], template: ChatTemplate) -> int:
    """How many of ``messages`` were read before: those up to the last answer.

    They must be the session's newest turns, word for word; white space around an answer doesn't count, and a
    system message that heads every request may have been read once. Raises RequestError where they aren't.
    """
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    if not answers:
        return 0
    newest = turns[len(turns) - len(answers) :] if len(answers) <= len(turns) else ()
    begin = 0
    for end, turn in zip(answers, newest, strict=False):
        asked = list(messages[begin:end])
        without_head = [m for m in asked if m[0] not in ("system", "developer")]
        readings = {"".join(template.render(*m) for m in part) for part in (asked, without_head)}
        if turn.prompt not in readings or turn.answer.strip() != messages[end][1].strip():
            break
        begin = end + 1
    if begin != answers[-1] + 1:
        raise RequestError(
            "the resent history isn't what this session has read: send the new messages alone",
            param="messages",
            code="history_mismatch",
        )
    return begin
