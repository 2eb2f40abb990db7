"""Chunks on their way into states, and what came of them for each session. Knows no model, row or request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mnemosyne.engine.chunk_trace import ChunkTraces
from mnemosyne.engine.errors import MnemosyneError, NotFinite
from mnemosyne.engine.pyramid import Values, overall
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace


class Commit(Protocol):
    """A commit that was begun, beside what its model is asked for meanwhile."""

    def ended(self) -> bool: ...

    def result(self) -> tuple[list[SessionState], Trace]:
        """As ``prefill``, when it has ended. Raises what went wrong."""
        ...


@dataclass(frozen=True)
class Made:
    """A commit that ended when it was made."""

    states: list[SessionState]
    trace: Trace

    def ended(self) -> bool:
        return True

    def result(self) -> tuple[list[SessionState], Trace]:
        return self.states, self.trace


@dataclass(frozen=True)
class Raised:
    """A commit that couldn't be begun."""

    error: Exception

    def ended(self) -> bool:
        return True

    def result(self) -> tuple[list[SessionState], Trace]:
        raise self.error


@dataclass(frozen=True)
class Committed:
    """A state after one or more chunks more, nothing pending."""

    state: SessionState
    trace: ChunkTraces
    tokens: Values | None = None
    """Where asked for, `[tokens, layers, 2]`: surprise and momentary of every token."""


def outcomes(
    before: Sequence[SessionState], after: Sequence[SessionState], trace: Trace, chunk: int
) -> list[Committed | MnemosyneError]:
    """Of each session: NotFinite where a number no longer is one."""
    means = overall(trace.chunks)
    finite = _finite(after) if trace.finite is None else trace.finite
    found: list[Committed | MnemosyneError] = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if not finite[i]:
            where = f"between tokens {old.position} and {new.position}"
            found.append(NotFinite(f"the memory stopped being finite {where}"))
            continue
        ends = old.position + chunk * np.arange(1, len(means[i]) + 1)
        chunks = ChunkTraces(np.column_stack([ends, means[i], trace.written[i]]))
        found.append(Committed(new, chunks, None if trace.tokens is None else trace.tokens[i]))
    return found


def _finite(states: Sequence[SessionState]) -> list[bool]:
    """Whether all of each state's values are finite: a sum is finite only if every term is, and costs one
    pass."""
    sums = torch.stack(
        [torch.stack([t.sum(dtype=torch.float32) for t in state.tensors.values()]) for state in states]
    )
    return [bool(ok) for ok in torch.isfinite(sums).all(dim=1).tolist()]
