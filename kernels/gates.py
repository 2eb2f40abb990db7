"""Scalars of the chunk form: gates and the decays made of them. Tensors in, tensors out; knows no module.

Notation (Titans, arXiv 2501.00663, eq. 13-14; alpha is the FORGET rate): in a chunk that begins at (M_0, S_0)

    M_t = A_t M_0 + F_t S_0 - sum_{j<=t} G_tj g_j          S_t = E_t S_0 - sum_{j<=t} P_tj theta_j g_j

with A_t, E_t the products of 1 - alpha and eta up to t, P_tj = E_t / E_j, F_t = sum_i (A_t / A_i) E_i and
G_tj = theta_j sum_{i=j..t} (A_t / A_i) P_ij. Everything is a product of numbers in [0, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mnemosyne.kernels import elementwise


def gate(z: Tensor, maximum: float, epsilon: float) -> Tensor:
    """maximum * relu(sigmoid(z) - eps) / (1 - eps): reaches exactly 0 (spec/memory.md 2).

    Below the threshold the gradient is sigmoid's (straight-through), so that a closed gate can open again.
    """
    s = elementwise.sigmoid(z)
    value = torch.relu(s - epsilon) * (maximum / (1 - epsilon))
    if torch.is_grad_enabled() and z.requires_grad:
        soft = s * (maximum / (1 - epsilon))
        return soft + (value - soft).detach()
    return value


class Decays(NamedTuple):
    """Per chunk of L tokens; leading dimensions are those of the gates."""

    A: Tensor
    """`[..., L]`: what is left of M_0 after token t."""
    F: Tensor
    """`[..., L]`: what of S_0 has reached M after token t."""
    E: Tensor
    """`[..., L]`: what is left of S_0."""
    G: Tensor
    """`[..., L, L]`: weight of token j's gradient in M after token t; lower triangular."""
    P: Tensor
    """`[..., L, L]`: theta_j E_t / E_j, its weight in S."""


def _ratios(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Products of ``factor`` over (j, t] as `[..., L, L]`, 0 above the diagonal, and over [1, t], `[..., L]`.

    Differences of logs, since ratios of cumulative products underflow. A factor that is exactly 0 is a reset:
    logs leave it out and a running count of resets masks every product that spans one.
    """
    reset = factor <= 0
    logs = elementwise.log(torch.where(reset, torch.ones_like(factor), factor)).cumsum(-1)
    count = reset.to(factor.dtype).cumsum(-1)
    length = factor.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=factor.device).tril()
    kept = lower & (count.unsqueeze(-1) == count.unsqueeze(-2))
    difference = logs.unsqueeze(-1) - logs.unsqueeze(-2)
    ratios = elementwise.exp(difference.masked_fill(~kept, float("-inf")))
    whole = elementwise.exp(logs) * (count == 0)
    return ratios, whole


def decays(theta: Tensor, eta: Tensor, alpha: Tensor) -> Decays:
    """Decays of chunks from gates `[..., L]` (L tokens of one chunk each)."""
    keep, A = _ratios(1 - alpha)
    carry, E = _ratios(eta)
    shape = keep.shape
    flat = (-1, shape[-2], shape[-1])
    C = torch.bmm(keep.reshape(flat), carry.reshape(flat)).view(shape)
    F = torch.matmul(keep, E.unsqueeze(-1)).squeeze(-1)
    weight = theta.unsqueeze(-2)
    return Decays(A, F, E, C * weight, carry * weight)
