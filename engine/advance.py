"""How one state moves: ``advance(model, state, tokens)``. Owns when a chunk is committed; knows no batch.

The engine's loop applies the same rule to many sessions at once; this is its meaning for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mnemosyne.engine.ids import Ids, joined
from mnemosyne.engine.state import INPUT, SessionState
from mnemosyne.engine.trace import Trace


class Prefills(Protocol):
    """As much of a model as a state needs to move."""

    def prefill(self, states: Sequence[SessionState], tokens: Tensor) -> tuple[list[SessionState], Trace]: ...


def split(
    state: SessionState, tokens: Sequence[int] | Ids, kinds: bytes | None, chunk: int
) -> tuple[Ids, tuple[int, ...], bytes]:
    """Token ids to commit (whole chunks, none maybe), then the ids and kinds that stay pending.

    A whole chunk stays pending until a token after it arrives (``engine.state``).
    """
    kinds = bytes([INPUT]) * len(tokens) if kinds is None else kinds
    ids = joined(state.pending, tokens)
    every = state.kinds + kinds
    whole = max(0, (len(ids) - 1) // chunk) * chunk
    return ids[:whole], tuple(ids[whole:].tolist()), every[whole:]


def advance(
    model: Prefills, state: SessionState, tokens: Sequence[int], kinds: bytes | None = None, *, chunk: int
) -> SessionState:
    """The state after reading ``tokens`` on top of ``state``; the same for any split of them into calls."""
    whole, pending, rest = split(state, tokens, kinds, chunk)
    committed = dataclasses.replace(state, pending=(), kinds=b"")
    if len(whole):
        committed = model.prefill([committed], torch.from_numpy(whole)[None])[0][0]
    return dataclasses.replace(committed, pending=pending, kinds=rest)
