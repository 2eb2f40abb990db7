"""The Titans rule as it is written: token by token, gradients from autograd. Slow; all else is held to it.

Owns no speed. One head, one session; run it in float64. Titans eq. 11-15; gradients of a chunk at its start
(section 3.2), M and S moving token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_network(weights: Sequence[Tensor], x: Tensor, residual: bool, norm: bool) -> Tensor:
    """M(x) for rows ``x`` `[T, d]`, weights `[out, in]`."""
    z = x
    for i, weight in enumerate(weights):
        z = z @ weight.T
        if i + 1 < len(weights):
            z = F.gelu(z, approximate="tanh")
    if norm:
        z = F.layer_norm(z, z.shape[-1:], eps=1e-6)
    return x + z if residual else z


def titans_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    memory: Sequence[Tensor],
    momentum: Sequence[Tensor],
    *,
    chunk: int,
    residual: bool = True,
    norm: bool = True,
    clip: float | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Reads `[T, d]`, final M, final S, and gradient norms `[D, T]` before clipping.

    ``q``, ``k``, ``v`` `[T, d]`; gates `[D, T]`, one row a memory layer; token 0 starts a chunk.
    """
    M, S = [m.clone() for m in memory], [s.clone() for s in momentum]
    reads, norms = [], []
    frozen: list[Tensor] = []
    for t in range(q.shape[0]):
        if t % chunk == 0:
            frozen = [m.detach().clone().requires_grad_(True) for m in M]
        loss = (memory_network(frozen, k[t : t + 1], residual, norm) - v[t : t + 1]).square().sum()
        gradients = torch.autograd.grad(loss, frozen)
        norms.append(torch.stack([g.norm() for g in gradients]))
        for i, gradient in enumerate(gradients):
            if clip is not None:
                gradient = gradient * torch.clamp(clip / gradient.norm().clamp(min=1e-30), max=1.0)
            S[i] = eta[i, t] * S[i] - theta[i, t] * gradient
            M[i] = (1 - alpha[i, t]) * M[i] + S[i]
        reads.append(memory_network(M, q[t : t + 1], residual, norm))
    return torch.cat(reads), M, S, torch.stack(norms, 1)
