"""A memory rule as it is written: token by token, gradients from autograd. Slow; all else is held to it.

Owns no speed. One head, one session; run it in float64. Titans eq. 11-15 and the rules of MIRAS
(spec/memory.md 4); gradients of a chunk at its start (Titans 3.2), what is kept and S moving token by
token. Of a rule it takes the loss, not its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.kernels.gates import Gates
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule


def memory_network(weights: Sequence[Tensor], x: Tensor, architecture: Architecture) -> Tensor:
    """M(x) for rows ``x`` `[T, d]`, weights `[out, in]`."""
    z = x
    for i, weight in enumerate(weights):
        z = z @ weight.T
        if i + 1 < len(weights):
            z = F.gelu(z, approximate="tanh")
    if architecture.norm:
        z = F.layer_norm(z, z.shape[-1:], eps=1e-6)
    return x + z if architecture.residual else z


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    memory: Sequence[Tensor],
    momentum: Sequence[Tensor],
    rule: MemoryRule,
    *,
    chunk: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Reads `[T, d]`, final M (what is kept), final S, and gradient norms `[D, T]` before clipping.

    ``q``, ``k``, ``v`` `[T, d]`; gates `[D, T]`, one row a memory layer, the threshold `[T]`; ``momentum``
    empty where the rule has none; token 0 starts a chunk.
    """
    M, S = [m.clone() for m in memory], [s.clone() for s in momentum]
    clip = rule.algorithm.clip
    reads, norms = [], []
    frozen: list[Tensor] = []
    factors: list[Tensor | None] = []
    for t in range(q.shape[0]):
        if t % chunk == 0:
            frozen = [w.detach().clone().requires_grad_(True) for w in rule.weights(M)]
            factors = [rule.retention.factor(m) for m in M]
        output = memory_network(frozen, k[t : t + 1], rule.architecture)
        threshold = None if gates.threshold is None else gates.threshold[t : t + 1]
        loss = rule.bias.loss(output, v[t : t + 1], threshold).sum()
        gradients = torch.autograd.grad(loss, frozen)
        norms.append(torch.stack([g.norm() for g in gradients]))
        used = []
        for i, gradient in enumerate(gradients):
            if clip is not None:
                gradient = gradient * torch.clamp(clip / gradient.norm().clamp(min=1e-30), max=1.0)
            step = -gates.theta[i, t] * gradient
            if S:
                assert gates.eta is not None
                step = S[i] = gates.eta[i, t] * S[i] + step
            kept = M[i] if gates.alpha is None else (1 - gates.alpha[i, t]) * M[i]
            M[i] = kept + step
            factor = factors[i]
            used.append(M[i] * factor if factor is not None else rule.retention.weights(M[i]))
        reads.append(memory_network(used, q[t : t + 1], rule.architecture))
    return torch.cat(reads), M, S, torch.stack(norms, 1)
