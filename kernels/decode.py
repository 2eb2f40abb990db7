"""The Titans rule one token at a time inside a chunk, on top of the weights at the chunk's start.

The memory stays as it was; the chunk's tokens live in a cache and are read through it. Nothing here is ever
committed: when the chunk is whole, the chunk form runs on it. Equal to ``chunk.read`` up to rounding.
Knows no module. Shapes as in ``chunk``: B sessions, H heads, D memory layers, L tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mnemosyne.kernels import network


def cache_shapes(heads: int, chunk: int, shapes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one session's cache for memory matrices of ``shapes`` (out, in)."""
    depth = len(shapes)
    names: dict[str, tuple[int, ...]] = {"decay": (3, heads, depth), "rows": (2, heads, depth, chunk)}
    for i, (out, inn) in enumerate(shapes):
        names[f"inputs.{i}"] = (heads, chunk, inn)
        names[f"deltas.{i}"] = (heads, chunk, out)
    return names


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    memory: Sequence[Tensor],
    momentum: Sequence[Tensor],
    cache: Mapping[str, Tensor],
    index: Tensor,
    *,
    residual: bool,
    norm: bool,
    clip: float | None,
) -> Tensor:
    """Store token ``index[b]`` of each session's chunk in its cache and read after it; returns `[B, H, d]`.

    ``q``, ``k``, ``v`` `[B, H, d]`; ``gates`` theta, eta, alpha as `[3, B, H, D]`; ``memory`` and
    ``momentum`` `[B, H, out, in]` a memory layer; ``cache`` as ``cache_shapes`` with B in front, changed in
    place; ``index`` `[B]` int64. ``decay`` holds A, F, E; ``rows`` the rows of G and P so far
    (``gates.Decays``).
    """
    B, H, d = q.shape
    N = B * H
    depth = len(memory)
    theta, eta, alpha = gates
    W = [m.reshape(N, *m.shape[2:]) for m in memory]
    factors = network.gradient_factors(W, k.reshape(N, 1, d), v.reshape(N, 1, d), residual, norm, clip)
    sessions = torch.arange(B, device=q.device)
    for i in range(depth):
        cache[f"inputs.{i}"][sessions, :, index] = factors.inputs[i].view(B, H, -1)
        cache[f"deltas.{i}"][sessions, :, index] = factors.deltas[i].view(B, H, -1)

    decay, rows = cache["decay"], cache["rows"]
    A, F, E = decay.unbind(1)
    keep = 1 - alpha
    A, E = keep * A, eta * E
    F = keep * F + E
    decay.copy_(torch.stack([A, F, E], 1))
    here = torch.zeros(B, rows.shape[-1], dtype=torch.bool, device=q.device)
    here[sessions, index] = True
    here = here[:, None, None]
    G, P = rows.unbind(1)
    new = theta.unsqueeze(-1)
    P = torch.where(here, new, eta.unsqueeze(-1) * P)
    G = torch.where(here, new, keep.unsqueeze(-1) * G + P)
    rows.copy_(torch.stack([G, P], 1))

    x = q.reshape(N, 1, d)
    first = x
    for i in range(depth):
        S = momentum[i].reshape(N, *momentum[i].shape[2:])
        a = cache[f"inputs.{i}"].reshape(N, -1, x.shape[-1])
        delta = cache[f"deltas.{i}"].reshape(N, a.shape[1], -1)
        scores = torch.bmm(x, a.transpose(1, 2)) * G[:, :, i].reshape(N, 1, -1)
        z = (
            A[:, :, i].reshape(N, 1, 1) * torch.bmm(x, W[i].transpose(1, 2))
            + F[:, :, i].reshape(N, 1, 1) * torch.bmm(x, S.transpose(1, 2))
            - torch.bmm(scores, delta)
        )
        x = network.activation(z) if i + 1 < depth else z
    return network.finish(x, first, residual, norm).view(B, H, d)
