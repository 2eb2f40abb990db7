"""One request on its way through the engine. Owns what is known of it between two steps; knows no model.

States pass from request to request in slots: whoever was accepted while the slot of its base was empty waits
for it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.holdings import Held, Running
from mnemosyne.engine.ids import NO_IDS, Ids
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

    held: Held | None = None
    error: MnemosyneError | None = None
    waiting: list[Job] = field(default_factory=list)
    _rest: SessionState | None = None
    """The state without its tensors, which change when it moves to another tier."""

    def bind(self, state: SessionState, held: Held) -> None:
        """``held`` is of the state's tensors."""
        self.held, self._rest = held, dataclasses.replace(state, tensors={})

    @property
    def state(self) -> SessionState | None:
        """As it is now, wherever its tensors are."""
        if self.held is None or self._rest is None:
            return None
        return dataclasses.replace(self._rest, tensors=self.held.tensors)

    @property
    def settled(self) -> bool:
        return self.held is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """An accepted request."""

    request: Work
    base: Slot | None
    """Let go once the request has begun."""
    result: Slot | None
    tokens: Ids = field(default_factory=lambda: NO_IDS)
    """What the request brings, checked; let go once it has begun."""
    sampler: Sampler | None = None
    admitted: bool = False
    """It has its place on the device."""
    reserve: int = 0
    """Bytes on the device of the state that it will make and hasn't yet."""
    start: int = 0
    """Tokens that the base had seen."""
    state: SessionState | None = None
    """While ingesting: the newest commit."""
    whole: Ids = field(default_factory=lambda: NO_IDS)
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

    @property
    def running(self) -> Running:
        """What it keeps on the device."""
        if self.decoding is not None:
            return Running(self.decoding.state.tensors, self.reserve, self.decoding.committing)
        if self.state is not None:
            return Running(self.state.tensors, self.reserve)
        held = self.base.held if self.base is not None else None
        return Running(held.tensors if held is not None else None, self.reserve)
