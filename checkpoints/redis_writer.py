"""Fenced writes to a session in Redis, each done once or not at all. Owns key names and lost answers; knows
no record.

When the line breaks while a write is under way, it may have landed, may land later, or never. Before this
client uses the session again, it raises the session's epoch, which keeps a late write out, and undoes what
landed. So a write that raised StoreUnavailable stays away, unless this process ends before Redis is back:
then it may stand, as a write may that was on disk when its process was killed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mnemosyne.checkpoints import redis_scripts as scripts
from mnemosyne.checkpoints.names import session_name
from mnemosyne.checkpoints.redis_link import LostAnswer, RedisLink
from mnemosyne.engine.errors import LeaseLost, SessionNotFound


@dataclass(frozen=True)
class Doubt:
    """A write whose answer was lost, and what undoes it."""

    fence: int
    token: bytes = b""
    """What its journal records begin with."""
    document_id: str = ""
    length: int = 0
    """Of that document's spool before."""


class RedisWriter:
    def __init__(self, link: RedisLink, prefix: str) -> None:
        self.link = link
        self.prefix = prefix
        # One write of a session at a time, so that a doubt is about the last thing that this client wrote to
        # it.
        self._locks = [threading.RLock() for _ in range(64)]
        self._doubts: dict[str, Doubt] = {}
        self._epochs: dict[str, bytes] = {}
        """Of sessions where it isn't 0."""

    def key(self, session_id: str, name: str) -> str:
        """Raises SessionNotFound for an id that no session can have."""
        return f"{self.prefix}{{{session_name(session_id)}}}:{name}"

    @contextmanager
    def settled(self, session_id: str) -> Iterator[None]:
        """Nothing is in doubt about the session, and nothing else writes to it from here.

        Raises StoreUnavailable.
        """
        with self._locks[hash(session_id) % len(self._locks)]:
            self._settle(session_id)
            yield

    def settle(self, session_id: str) -> None:
        """Before a read: undo what is in doubt, without waiting for a write under way."""
        if session_id in self._doubts:
            with self.settled(session_id):
                pass

    def write(
        self,
        session_id: str,
        script: str,
        fence: int,
        keys: Sequence[str],
        args: Sequence[object],
        doubt: Doubt | None = None,
    ) -> list[Any]:
        """Run a writing script; ``doubt`` says how to undo it. Tried twice over a line that breaks.

        Raises LeaseLost, SessionNotFound, StoreUnavailable.
        """
        with self.settled(session_id):
            try:
                return self._fenced(session_id, script, fence, keys, args)
            except LostAnswer:
                self._doubts[session_id] = doubt or Doubt(fence)
            self._settle(session_id)
            try:
                return self._fenced(session_id, script, fence, keys, args)
            except LostAnswer:
                self._doubts[session_id] = doubt or Doubt(fence)
                raise

    def _settle(self, session_id: str) -> None:
        doubt = self._doubts.get(session_id)
        if doubt is None:
            return
        keys = [self.key(session_id, "journal"), self.key(session_id, "spools")]
        args = [doubt.token, doubt.document_id, doubt.length]
        # Another owner's by now, or erased: nothing of that fence can land any more.
        with suppress(LeaseLost, SessionNotFound):
            self._fenced(session_id, scripts.GIVE_UP, doubt.fence, keys, args)
        del self._doubts[session_id]

    def _fenced(
        self, session_id: str, script: str, fence: int, keys: Sequence[str], args: Sequence[object]
    ) -> list[Any]:
        while True:
            epoch = self._epochs.get(session_id, b"0")
            names = [self.key(session_id, "session"), *keys]
            answer = self.link.run(script, names, [fence, epoch, *args])
            if answer[0] == b"missing":
                self._epochs.pop(session_id, None)
                raise SessionNotFound("no such session")
            if answer[0] == b"lost":
                newest = int(answer[1])
                raise LeaseLost("the session is another writer's by now", fence=fence, newest=newest)
            if answer[0] != b"epoch":
                return answer
            self._epochs[session_id] = answer[1]
