"""One request on its way through the engine. Owns what is known of it between two steps; knows no model.

States pass from request to request in slots: whoever was accepted while the slot of its base was empty waits
for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.messages import Advance, Export, Generate, Load, ReadTrace, TraceTokens
from mnemosyne.engine.pyramid import Values
from mnemosyne.engine.runner import Decoding
from mnemosyne.engine.sampling import Sampler
from mnemosyne.engine.state import SessionState

Work = Advance | Generate | Export | Load | ReadTrace | TraceTokens
"""Requests that take their turn in a step."""


@dataclass(eq=False)
class Slot:
    """A place for a state: empty, then bound or failed, once. Outlives its handle while requests refer to
    it."""

    state: SessionState | None = None
    error: MnemosyneError | None = None
    waiting: list[Job] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        return self.state is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """An accepted request."""

    request: Work
    base: Slot | None
    """Let go once the request has begun."""
    result: Slot | None
    sampler: Sampler | None = None
    start: int = 0
    """Tokens that the base had seen."""
    state: SessionState | None = None
    """While ingesting: the newest commit."""
    whole: tuple[int, ...] = ()
    """Whole chunks to commit, in order; the first ``read`` tokens of them are committed."""
    read: int = 0
    rest: tuple[int, ...] = ()
    """What stays pending after them."""
    rest_kinds: bytes = b""
    decoding: Decoding | None = None
    emitted: list[int] = field(default_factory=list)
    traced: list[Values] = field(default_factory=list)
    """Per committed chunks `[tokens, layers, 2]`, where they are asked for."""

    @property
    def id(self) -> str:
        return self.request.request_id
