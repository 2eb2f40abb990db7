"""A memory rule one token at a time inside a chunk, on top of what is kept at the chunk's start.

The memory stays as it was; the chunk's tokens live in a cache and are read through it. Nothing here is ever
committed: when the chunk is whole, the chunk form runs on it. Equal to ``chunk.read`` up to rounding. Knows
no module and no rule by name. Shapes as in ``chunk``: B sessions, H heads, D memory layers, L tokens a
chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mnemosyne.kernels import chunk, network
from mnemosyne.kernels.gates import Decays, Gates
from mnemosyne.kernels.rules.rule import MemoryRule


def cache_shapes(
    heads: int, length: int, shapes: Sequence[tuple[int, int]], momentum: bool
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one session's cache for memory matrices of ``shapes`` (out, in) and chunks of
    ``length``."""
    depth = len(shapes)
    names: dict[str, tuple[int, ...]] = {
        "decay": (3 if momentum else 1, heads, depth),
        "rows": (2 if momentum else 1, heads, depth, length),
    }
    for i, (out, inn) in enumerate(shapes):
        names[f"inputs.{i}"] = (heads, length, inn)
        names[f"deltas.{i}"] = (heads, length, out)
    return names


def fresh(decay: Tensor) -> None:
    """Set the ``decay`` of caches `[B, 1 or 3, H, D]` to a chunk's start: all of M_0 and of S_0 is there, and
    nothing of S_0 in M."""
    decay.fill_(1)
    if decay.shape[1] > 1:
        decay[:, 1] = 0


def rows_at(decay: Decays, last: Tensor) -> dict[str, Tensor]:
    """``decay`` and ``rows`` of a cache after the token ``last`` `[B]` of the one chunk in ``decay``."""
    past = decay.past
    scalars = [decay.A] if past is None else [decay.A, past.F, past.E]
    squares = [decay.G] if past is None else [decay.G, past.P]
    B, H, D, _, L = decay.A.shape
    at = last.view(B, 1, 1, 1)
    return {
        "decay": torch.stack([x[:, :, :, 0].gather(3, at.expand(B, H, D, 1)).squeeze(3) for x in scalars], 1),
        "rows": torch.stack(
            [x[:, :, :, 0].gather(3, at.unsqueeze(-1).expand(B, H, D, 1, L)).squeeze(3) for x in squares], 1
        ),
    }


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    memory: Sequence[Tensor],
    momentum: Sequence[Tensor],
    cache: Mapping[str, Tensor],
    index: Tensor,
    rule: MemoryRule,
) -> Tensor:
    """Store token ``index[b]`` of each session's chunk in its cache and read after it; returns `[B, H, d]`.

    ``q``, ``k``, ``v`` `[B, H, d]`; ``gates`` of the token, `[B, H, D]` (threshold `[B, H]`); ``memory``
    and ``momentum`` `[B, H, out, in]` a memory layer, momentum empty without; ``cache`` as ``cache_shapes``
    with B in front, changed in place; ``index`` `[B]` int64. ``decay`` holds A, F, E; ``rows`` the rows of
    G and P so far (``gates.Decays``); without momentum A and G alone.
    """
    B, H, d = q.shape
    N = B * H
    depth = len(memory)
    M = [m.reshape(N, *m.shape[2:]) for m in memory]
    threshold = None if gates.threshold is None else gates.threshold.reshape(N, 1)
    factors = network.gradient_factors(
        rule.weights(M), k.reshape(N, 1, d), v.reshape(N, 1, d), threshold, rule
    )
    sessions = torch.arange(B, device=q.device)
    for i in range(depth):
        cache[f"inputs.{i}"][sessions, :, index] = factors.inputs[i].view(B, H, -1)
        cache[f"deltas.{i}"][sessions, :, index] = factors.deltas[i].view(B, H, -1)
    _extend(gates, cache["decay"], cache["rows"], index)

    shares = cache["decay"].unbind(1)[:2]  # A, and F where there is momentum
    x = q.reshape(N, 1, d)
    first = x
    for i in range(depth):
        start = [M[i]] + [S.reshape(M[i].shape) for S in momentum[i : i + 1]]
        z = chunk.apply(
            x,
            start,
            [share[:, :, i].reshape(N, 1, 1) for share in shares],
            cache["rows"][:, 0, :, i].reshape(N, 1, -1),
            cache[f"inputs.{i}"].flatten(0, 1),
            cache[f"deltas.{i}"].flatten(0, 1),
            rule,
        )
        x = network.activation(z) if i + 1 < depth else z
    return network.finish(x, first, rule.architecture).view(B, H, d)


def _extend(gates: Gates, decay: Tensor, rows: Tensor, index: Tensor) -> None:
    """Take the token into A, F, E and the rows of G and P, in place."""
    A, *past = decay.unbind(1)
    keep = torch.ones_like(A) if gates.alpha is None else 1 - gates.alpha
    here = torch.zeros(len(index), rows.shape[-1], dtype=torch.bool, device=index.device)
    here[torch.arange(len(index), device=index.device), index] = True
    here = here[:, None, None]
    new, kept = gates.theta.unsqueeze(-1), keep.unsqueeze(-1) * rows[:, 0]
    if gates.eta is None:
        decay.copy_((keep * A).unsqueeze(1))
        rows.copy_(torch.where(here, new, kept).unsqueeze(1))
        return
    F, E = past
    E = gates.eta * E
    F = keep * F + E
    decay.copy_(torch.stack([keep * A, F, E], 1))
    P = torch.where(here, new, gates.eta.unsqueeze(-1) * rows[:, 1])
    G = torch.where(here, new, kept + P)
    rows.copy_(torch.stack([G, P], 1))
