"""What reading did to the memory: surprise, movement, share written (spec/memory.md 5). Knows no model.

Bits don't depend on what else is in the batch: sums run over a last, contiguous dimension alone, and over
memory layers by adding one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnemosyne.engine.memory import Learned
from mnemosyne.engine.pyramid import Values
from mnemosyne.kernels.health import gain

GAIN_EVERY = 64
"""Of a session's chunks, how many lie between two of which the gain is measured: of all of them it would cost
as much again as the rest of the trace."""
History = Sequence[Sequence[Learned]]
"""Of every layer what it learned over the same chunks, in one part or several."""


@dataclass(frozen=True)
class Trace:
    """Of B sessions that committed n chunks each."""

    chunks: Values
    """`[B, n, layers, pyramid.FIELDS]`: surprise (norm of a token's whole inner gradient, before clipping)
    and momentary surprise (each memory layer's part times its theta), means over heads and tokens; moved,
    ||M_after - M_before|| / ||M_before|| of all heads together; gain (``kernels.health``), the largest of the
    heads', NaN but for every ``GAIN_EVERY``th chunk of the session."""
    written: NDArray[np.float64]
    """`[B, n]`: share of (layer, head, memory layer) cells that the chunk changed."""
    tokens: Values | None = None
    """Where asked for, `[B, n chunk, layers, 2]`: surprise and momentary of every token, means over heads."""
    finite: NDArray[np.bool_] | None = None
    """`[B]`: whether every number of the session still is one; None: the new state itself must be asked."""

    @classmethod
    def joined(cls, parts: Sequence[Trace]) -> Trace:
        """Of the same sessions, one stretch of chunks after the other."""
        if len(parts) == 1:
            return parts[0]
        tokens = [part.tokens for part in parts if part.tokens is not None]
        finite = [part.finite for part in parts if part.finite is not None]
        return cls(
            np.concatenate([part.chunks for part in parts], 1),
            np.concatenate([part.written for part in parts], 1),
            np.concatenate(tokens, 1) if tokens else None,
            np.logical_and.reduce(finite) if finite else None,
        )


def of_tokens(layers: History) -> Tensor:
    """Surprise and momentary surprise of every token, `[2, layers, B, H, n, L]`."""
    norms = torch.stack([_joined([part.scan.norms for part in parts], 3) for parts in layers])
    theta = torch.stack([_joined([part.gates.theta for part in parts], 3) for parts in layers])
    each = torch.stack([norms, norms * theta])
    return reduce(add, (each * each).unbind(4)).sqrt()


def gains(layers: History, first: NDArray[np.int64]) -> Tensor:
    """`[layers, B, H, n]`: by how much a chunk may amplify a disturbance of the memory; NaN but for every
    ``GAIN_EVERY``th chunk of a session. ``first`` `[B]`: chunks that the sessions had committed before."""
    B, H, _, n, _ = layers[0][0].scan.norms.shape
    n *= len(layers[0])
    norms = layers[0][0].scan.norms
    found = torch.full((len(layers), B, H, n), torch.nan, dtype=norms.dtype, device=norms.device)
    places = -(first + 1) % GAIN_EVERY
    for place in np.unique(places[places < n]).tolist():
        rows = np.flatnonzero(places == place)
        # No copy where all sessions stand alike, or there is one.
        which = slice(None) if len(rows) == B else torch.from_numpy(rows).to(found.device)
        measured = _gain(layers, place, which).view(len(layers), len(rows), H, -1)
        found[:, which, :, place::GAIN_EVERY] = measured
    return found


def _gain(layers: History, place: int, which: slice | Tensor) -> Tensor:
    """Of a ``GAIN_EVERY``th of the chunks from ``place`` on, in the sessions ``which``; all layers as if they
    were sessions, `[layers B', H, n']`."""

    def some(pick: Callable[[Learned], Tensor]) -> Tensor:
        """``pick`` gives `[B, H, n, ...]`."""
        kept = []
        for parts in layers:
            # Several parts are one chunk each.
            several = len(parts) > 1
            chunks = (
                torch.cat([pick(part) for part in parts[place::GAIN_EVERY]], 2)
                if several
                else (pick(parts[0])[:, :, place::GAIN_EVERY])
            )
            kept.append(chunks[which])
        return torch.cat(kept)

    one = layers[0][0]
    scan = one.scan._replace(
        starts=[some(lambda part: part.scan.starts[-1][:, :, :, :1])],
        inputs=[some(lambda part: part.scan.inputs[-1])],
        norms=some(lambda part: part.scan.norms[:, :, -1]).unsqueeze(2),
        rstd=None if one.scan.rstd is None else some(lambda part: cast(Tensor, part.scan.rstd)),
    )
    decay = one.decay._replace(
        A=some(lambda part: part.decay.A[:, :, -1, :, -1:]).unsqueeze(2),
        G=some(lambda part: part.decay.G[:, :, -1, :, -1:]).unsqueeze(2),
    )
    return gain(scan, decay, one.rule)


def moves(learned: Learned) -> list[Tensor]:
    """For each memory layer ||M_after - M_before|| and ||M_before||, `[B, H, n]` each."""
    norms = []
    for start, final in zip(learned.scan.starts, learned.scan.memory, strict=True):
        before, last = start[:, :, :, 0].flatten(-2), final.flatten(-2)
        step = torch.empty_like(before, memory_format=torch.contiguous_format)
        if step.shape[2] > 1:
            torch.sub(before[:, :, 1:], before[:, :, :-1], out=step[:, :, :-1])
        torch.sub(last, before[:, :, -1], out=step[:, :, -1])
        norms += [torch.linalg.vector_norm(x, dim=-1) for x in (step, before)]
    return norms


def summarize(layers: History, first: Sequence[int], per_token: bool = False) -> Trace:
    """Of B sessions that had committed ``first`` chunks before."""
    tokens = of_tokens(layers)
    moved = [
        _joined(same, -1) for parts in layers for same in zip(*[moves(part) for part in parts], strict=True)
    ]
    steps = torch.stack(moved).unflatten(0, (len(layers), -1)).transpose(0, 1)
    cells = torch.cat([tokens.sum(-1), gains(layers, np.array(first)).unsqueeze(0), steps])
    found = cells.movedim(3, -1).contiguous().cpu().numpy().astype(np.float64)
    heads, length = tokens.shape[3], tokens.shape[5]
    surprise, momentary = found[:2].sum(-1) / (heads * length)
    squares = (found[3:] * found[3:]).sum(-1)
    step, before = reduce(add, squares[0::2]), reduce(add, squares[1::2])
    distance = np.sqrt(step / np.maximum(before, 1e-30))
    chunks = np.stack([surprise, momentary, distance, found[2].max(-1)], -1).transpose(1, 2, 0, 3)
    written = (found[3::2] > 0).mean((0, 1, 4))
    each = None
    if per_token:
        means = tokens.flatten(-2).movedim(3, -1).contiguous().cpu().numpy().astype(np.float64).mean(-1)
        each = means.transpose(2, 3, 1, 0).astype(np.float32)
    return Trace(chunks.astype(np.float32), written, each)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)
