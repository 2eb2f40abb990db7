"""The Titans rule in chunk form: the scan that moves the memory, and the causal read of every token.

Exact: equal to the token-by-token rule with all gradients of a chunk taken at its start (spec/memory.md 1).
The scan is sequential over chunks and does only what the state needs; the read is parallel over chunks. Knows
no module.

Shapes: B sessions, H heads, n chunks of L tokens, head_dim d, D memory layers. Weights are `[B, H, out, in]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.kernels import network
from mnemosyne.kernels.gates import Decays

TINY = 1e-30
"""Momentum below this is 0: what decays unwritten would become denormal, slow, and never exactly nothing."""


class Scan(NamedTuple):
    memory: list[Tensor]
    """Final M per memory layer `[B, H, out, in]`."""
    momentum: list[Tensor]
    starts: list[Tensor]
    """M and S at every chunk's start, per memory layer `[B, H, n, 2, out, in]`."""
    inputs: list[Tensor]
    """Per memory layer `[B, H, n, L, in]`."""
    deltas: list[Tensor]
    """Per memory layer `[B, H, n, L, out]`."""
    norms: Tensor
    """`[B, H, D, n, L]`: gradient norms before clipping (surprise)."""


def learn_chunk(
    M: list[Tensor],
    S: list[Tensor],
    k: Tensor,
    v: Tensor,
    scalars: Tensor,
    rows: Tensor,
    *,
    residual: bool,
    norm: bool,
    clip: float | None,
) -> tuple[list[Tensor], list[Tensor], network.Factors]:
    """One chunk: M' = A M + F S - (w delta)^T a and S' = E S - (s delta)^T a for every memory layer.

    ``M``, ``S`` `[N, out, in]`; ``k``, ``v`` `[N, L, d]`; ``scalars`` A, F, E of the chunk's end `[N, D, 3]`;
    ``rows`` w, s `[N, D, L, 2]`.
    """
    factors = network.gradient_factors(M, k, v, residual, norm, clip)
    memory, momentum = [], []
    for i in range(len(M)):
        out = M[i].shape[1]
        keep, arrived, left = scalars[:, i].unsqueeze(-1).unsqueeze(-1).unbind(1)
        delta, weight = factors.deltas[i], rows[:, i]
        weighted = torch.cat([delta * weight[..., :1], delta * weight[..., 1:]], -1)
        step = torch.bmm(weighted.transpose(1, 2), factors.inputs[i])
        memory.append(torch.addcmul(keep * M[i] - step[:, :out], arrived, S[i]))
        momentum.append(F.hardshrink(left * S[i] - step[:, out:], TINY))
    return memory, momentum, factors


def scan(
    k: Tensor,
    v: Tensor,
    decay: Decays,
    memory: Sequence[Tensor],
    momentum: Sequence[Tensor],
    *,
    residual: bool,
    norm: bool,
    clip: float | None,
) -> Scan:
    """Learn n chunks (Titans eq. 13-14, 16-18).

    ``k``, ``v`` `[B, H, n, L, d]`; ``decay`` of gates `[B, H, D, n, L]`; ``memory`` and ``momentum`` one
    tensor `[B, H, out, in]` a memory layer.
    """
    B, H, n, L, d = k.shape
    N = B * H
    M = [m.reshape(N, *m.shape[2:]) for m in memory]
    S = [s.reshape(N, *s.shape[2:]) for s in momentum]
    # Only each chunk's last row moves the state.
    scalars = torch.stack([x[..., -1] for x in (decay.A, decay.F, decay.E)], -1).reshape(N, len(M), n, 3)
    rows = torch.stack([decay.G[..., -1, :], decay.P[..., -1, :]], -1).reshape(N, len(M), n, L, 2)
    ks, vs = k.reshape(N, n, L, d), v.reshape(N, n, L, d)
    starts: list[list[Tensor]] = [[] for _ in M]
    inputs: list[list[Tensor]] = [[] for _ in M]
    deltas: list[list[Tensor]] = [[] for _ in M]
    norms = []
    for c in range(n):
        for i in range(len(M)):
            starts[i].append(torch.stack([M[i], S[i]], 1))
        M, S, factors = learn_chunk(
            M, S, ks[:, c], vs[:, c], scalars[:, :, c], rows[:, :, c], residual=residual, norm=norm, clip=clip
        )
        norms.append(factors.norms)
        for i in range(len(M)):
            inputs[i].append(factors.inputs[i])
            deltas[i].append(factors.deltas[i])

    def chunks(parts: list[Tensor]) -> Tensor:
        stacked = torch.stack(parts, 1)
        return stacked.view(B, H, n, *stacked.shape[2:])

    return Scan(
        [m.view(B, H, *m.shape[1:]) for m in M],
        [s.view(B, H, *s.shape[1:]) for s in S],
        [chunks(x) for x in starts],
        [chunks(x) for x in inputs],
        [chunks(x) for x in deltas],
        torch.stack(norms, 2).view(B, H, len(M), n, L),
    )


def read(q: Tensor, decay: Decays, scanned: Scan, *, residual: bool, norm: bool) -> Tensor:
    """y_t = M_t(q_t), the memory after token t's own store (Titans eq. 15); ``q`` and y `[B, H, n, L, d]`."""
    B, H, n, L, d = q.shape
    x = q.reshape(B * H * n, L, d)
    first = x
    depth = len(scanned.starts)
    for i in range(depth):
        start, a, delta = scanned.starts[i], scanned.inputs[i], scanned.deltas[i]
        out, inn = start.shape[-2:]
        # One product reads M_0 and S_0 together: [A x, F x] against [M_0; S_0].
        A = decay.A[:, :, i].reshape(-1, L, 1)
        arrived = decay.F[:, :, i].reshape(-1, L, 1)
        G = decay.G[:, :, i].reshape(-1, L, L)
        both = torch.bmm(x, start.reshape(-1, 2 * out, inn).transpose(1, 2))
        scores = torch.bmm(x, a.reshape(-1, L, inn).transpose(1, 2)) * G
        z = A * both[..., :out] + arrived * both[..., out:] - torch.bmm(scores, delta.reshape(-1, L, out))
        x = network.activation(z) if i + 1 < depth else z
    return network.finish(x, first, residual, norm).view(B, H, n, L, d)
