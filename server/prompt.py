"""How this checkpoint is asked: its ``prompt.json``. Owns the chat template; knows no request and no token
ids.

The file belongs to the checkpoint and its fingerprint. Every role has a string with ``{content}`` in it; the
answer begins where the template of the last message ends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mnemosyne.engine.errors import ConfigError

SLOT = "{content}"


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    system: str
    user: str
    assistant: str
    end_of_turn: str
    """What follows an answer, so that a turn in a session reads like one that was sent."""
    stop: tuple[str, ...]
    """Strings that end an answer, unless the request says ``ignore_eos``."""

    @classmethod
    def from_file(cls, path: Path) -> ChatTemplate:
        """Raises ConfigError for a file that is missing or incomplete."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            made = cls(
                system=content["system"],
                user=content["user"],
                assistant=content["assistant"],
                end_of_turn=content["end_of_turn"],
                stop=tuple(content["stop"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"can't read the chat template {path}: {error!r}") from error
        for role in ("system", "user", "assistant"):
            if getattr(made, role).count(SLOT) != 1:
                raise ConfigError(f"{path}: {role} must hold {SLOT} once")
        return made

    def render(self, role: str, text: str) -> str:
        """One message as the model reads it. ``developer`` is read as ``system``; an answer ends its turn."""
        template = {"user": self.user, "assistant": self.assistant}.get(role, self.system)
        before, after = template.split(SLOT)
        whole = before + text + after
        if role == "assistant" and not after.endswith(self.end_of_turn):
            whole += self.end_of_turn
        return whole

    @property
    def answer_prefix(self) -> str:
        """What an answer begins with in the template and isn't part of its content."""
        return self.assistant.split(SLOT)[0]
