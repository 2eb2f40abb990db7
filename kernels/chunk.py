"""A memory rule in chunk form: the scan that moves the memory, and the causal read of every token.

Exact: equal to the token-by-token rule with all gradients of a chunk taken at its start (spec/memory.md 1,
4). The scan is sequential over chunks and does only what the state needs; the read is parallel over chunks.
Knows no module and no rule by name.

Shapes: B sessions, H heads, n chunks of L tokens, head_dim d, D memory layers. What is kept of a memory
layer, M, is `[B, H, out, in]`; the weights in use are made of it by the rule (``rules.rule``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.kernels import network
from mnemosyne.kernels.gates import Decays
from mnemosyne.kernels.rules.rule import MemoryRule

log = logging.getLogger(__name__)

TINY = 1e-30
"""Memory and momentum below this are 0: what decays unwritten would become denormal, slow, and never exactly
nothing."""


class Scan(NamedTuple):
    memory: list[Tensor]
    """Final M per memory layer `[B, H, out, in]`."""
    momentum: list[Tensor]
    """Final S likewise; empty without momentum."""
    starts: list[Tensor]
    """M, and S where there is momentum, at every chunk's start: per memory layer `[B, H, n, 1 or 2, out,
    in]`."""
    inputs: list[Tensor]
    """Per memory layer `[B, H, n, L, in]`."""
    deltas: list[Tensor]
    """Per memory layer `[B, H, n, L, out]`."""
    norms: Tensor
    """`[B, H, D, n, L]`: gradient norms before clipping (surprise)."""
    rstd: Tensor | None
    """`[B, H, n, L]`: 1 / std of what the norm of M(k) was taken of, where there is one."""


def learn_chunk(
    M: list[Tensor],
    S: list[Tensor],
    k: Tensor,
    v: Tensor,
    threshold: Tensor | None,
    scalars: Tensor,
    rows: Tensor,
    rule: MemoryRule,
) -> tuple[list[Tensor], list[Tensor], network.Factors]:
    """One chunk: M' = A M + F S - (w delta)^T a and S' = E S - (s delta)^T a for every memory layer.

    ``M``, ``S`` `[N, out, in]`, S empty without momentum; ``k``, ``v`` `[N, L, d]`; ``threshold`` `[N, L]`;
    ``scalars`` of the chunk's end `[N, D, 1 or 3]`: A, and F and E; ``rows`` `[N, D, L, 1 or 2]`: w, and s.
    """
    factors = network.gradient_factors(rule.weights(M), k, v, threshold, rule)
    memory, momentum = [], []
    for i in range(len(M)):
        out = M[i].shape[1]
        delta, weight = factors.deltas[i], rows[:, i]
        scalar = scalars[:, i].unsqueeze(-1).unsqueeze(-1).unbind(1)
        weighted = torch.cat([delta * w for w in weight.split(1, -1)], -1)
        step = torch.bmm(weighted.transpose(1, 2), factors.inputs[i])
        kept = scalar[0] * M[i] - step[:, :out]
        if rule.algorithm.momentum:
            kept = torch.addcmul(kept, scalar[1], S[i])
            momentum.append(F.hardshrink(scalar[2] * S[i] - step[:, out:], TINY))
        memory.append(F.hardshrink(kept, TINY))
    return memory, momentum, factors


def scan(
    k: Tensor,
    v: Tensor,
    threshold: Tensor | None,
    decay: Decays,
    memory: Sequence[Tensor],
    momentum: Sequence[Tensor],
    rule: MemoryRule,
) -> Scan:
    """Learn n chunks (Titans eq. 13-14, 16-18).

    ``k``, ``v`` `[B, H, n, L, d]`; ``threshold`` `[B, H, n, L]` where the rule takes one; ``decay`` of gates
    `[B, H, D, n, L]`; ``memory`` and ``momentum`` one tensor `[B, H, out, in]` a memory layer, ``momentum``
    empty where the rule has none.
    """
    if _on_device(k, memory, rule):
        from mnemosyne.kernels.triton.scan import scan as launch

        return launch(k, v, threshold, decay, memory, momentum, rule)
    if _trains_on_device(k, memory, rule):
        from mnemosyne.kernels.triton.train_scan import scan as train

        return train(k, v, decay, memory, momentum, rule)
    k, v = (x.to(memory[0].dtype) for x in (k, v))
    B, H, n, L, d = k.shape
    N = B * H
    M = [m.reshape(N, *m.shape[2:]) for m in memory]
    S = [s.reshape(N, *s.shape[2:]) for s in momentum]
    scalars, rows = decay.end
    scalar = scalars.reshape(N, len(M), n, -1)
    row = rows.transpose(-1, -2).reshape(N, len(M), n, L, -1)
    ks, vs = k.reshape(N, n, L, d), v.reshape(N, n, L, d)
    limits = None if threshold is None else threshold.reshape(N, n, L)
    starts: list[list[Tensor]] = [[] for _ in M]
    inputs: list[list[Tensor]] = [[] for _ in M]
    deltas: list[list[Tensor]] = [[] for _ in M]
    norms, rstds = [], []
    for c in range(n):
        for i in range(len(M)):
            starts[i].append(torch.stack([M[i], S[i]] if S else [M[i]], 1))
        limit = None if limits is None else limits[:, c]
        M, S, factors = learn_chunk(M, S, ks[:, c], vs[:, c], limit, scalar[:, :, c], row[:, :, c], rule)
        norms.append(factors.norms)
        if factors.rstd is not None:
            rstds.append(factors.rstd)
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
        torch.stack(rstds, 1).view(B, H, n, L) if rstds else None,
    )


def read(q: Tensor, decay: Decays, scanned: Scan, rule: MemoryRule) -> Tensor:
    """y_t = M_t(q_t), the memory after token t's own store (Titans eq. 15); ``q`` and y `[B, H, n, L, d]`."""
    if _on_device(q, scanned.memory, rule):
        from mnemosyne.kernels.triton.read import read as launch

        return launch(q, decay, scanned, rule)
    if _trains_on_device(q, scanned.memory, rule):
        from mnemosyne.kernels.triton.train_read import read as train

        return train(q, decay, scanned, rule)
    B, H, n, L, d = q.shape
    x = q.to(scanned.norms.dtype).reshape(B * H * n, L, d)
    first = x
    depth = len(scanned.starts)
    scalars = [decay.A] if decay.past is None else [decay.A, decay.past.F]
    for i in range(depth):
        start, a, delta = (part[i].flatten(0, 2) for part in (scanned.starts, scanned.inputs, scanned.deltas))
        shares = [x[:, :, i].reshape(-1, L, 1) for x in scalars]
        G = decay.G[:, :, i].reshape(-1, L, L)
        z = apply(x, start.unbind(1), shares, G, a, delta, rule)
        x = network.activation(z) if i + 1 < depth else z
    return network.finish(x, first, rule.architecture).view(B, H, n, L, d)


def _on_device(x: Tensor, memory: Sequence[Tensor], rule: MemoryRule) -> bool:
    """Whether the kernels in ``triton/`` take these keys or queries: on a GPU, without gradients. Operands of
    their products have x's precision."""
    if not x.is_cuda or torch.is_grad_enabled():
        return False
    from mnemosyne.kernels.triton import support

    return _nothing(support.missing(x, memory, rule))


def _trains_on_device(x: Tensor, memory: Sequence[Tensor], rule: MemoryRule) -> bool:
    """Whether the differentiable kernels in ``triton/`` take these keys or queries: on a GPU, with
    gradients."""
    if not x.is_cuda or not torch.is_grad_enabled():
        return False
    from mnemosyne.kernels.triton import train_support

    return _nothing(train_support.missing(x, memory, rule))


def _nothing(missing: str | None) -> bool:
    if missing is not None:
        _say_once(missing)
    return missing is None


@cache
def _say_once(reason: str) -> None:
    log.warning("no kernel for %s: the reference runs, many times slower", reason)


def apply(
    x: Tensor,
    start: Sequence[Tensor],
    shares: Sequence[Tensor],
    G: Tensor,
    a: Tensor,
    delta: Tensor,
    rule: MemoryRule,
) -> Tensor:
    """W_t x_t of one memory layer, W_t made of M_t = A_t M_0 + F_t S_0 - sum_j G_tj delta_j a_j^T; `[N, T,
    out]`.

    ``x`` `[N, T, in]`; ``start`` M_0, and S_0 where there is momentum, `[N, out, in]` each, and ``shares`` A,
    and F, `[N, T, 1]`; ``G`` `[N, T, L]`; ``a`` `[N, L, in]`; ``delta`` `[N, L, out]`.
    """
    N, T, L = G.shape
    if rule.retention.proportional:
        # No W_t is ever formed: what stood at the start, and attention over the chunk's own stores.
        z = -torch.bmm(torch.bmm(x, a.transpose(1, 2)) * G, delta)
        for share, stood in zip(shares, start, strict=True):
            z = z + share * torch.bmm(x, stood.transpose(1, 2))
        factor = rule.retention.factor(start[0])
        return z if factor is None else z * factor
    # Every W_t is formed: L times the memory.
    out = delta.shape[2]
    weighted = (G.unsqueeze(-1) * delta.unsqueeze(1)).transpose(2, 3).reshape(N, T * out, L)
    kept = -torch.bmm(weighted, a).view(N, T, out, -1)
    for share, stood in zip(shares, start, strict=True):
        kept = kept + share.unsqueeze(-1) * stood.unsqueeze(1)
    weights = rule.retention.weights(kept.flatten(0, 1))
    return torch.bmm(weights, x.reshape(N * T, -1, 1)).view(N, T, out)
