"""Rotary positions and the causal depthwise convolution: what gives a token its place. Knows no module."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mnemosyne.kernels import elementwise


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[..., head_dim / 2]` of int64 positions `[...]`.

    Angles are reduced modulo 2 pi in float64 and then rounded, so position ten million keeps its phase.
    """
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    )
    angle = torch.remainder(positions.to(torch.float64).unsqueeze(-1) * frequency, 2 * math.pi)
    return elementwise.steady(torch.cos, angle).to(dtype), elementwise.steady(torch.sin, angle).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dimension; ``cos`` and ``sin`` broadcast against `x[..., :d/2]`."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution: ``x`` `[B, K - 1 + T, C]` begins with the K - 1 rows before; `[B, T, C]`.

    ``weight`` `[K, C]`, its last row for the token itself. Shifts, and not a library convolution, because
    their bits don't depend on T.
    """
    K = weight.shape[0]
    T = x.shape[1] - K + 1
    out = x[:, :T] * weight[0]
    for i in range(1, K):
        out = torch.addcmul(out, x[:, i : i + T], weight[i])
    return out
