"""The plain layers: dense products in the compute precision, RMSNorm, SwiGLU. Knows no memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.kernels import elementwise, fusion

ROWS = 8
"""Rows of a dense product are padded to a multiple of this: on a CPU, fp32 bits change below it."""


class Dense(nn.Module):
    """x W^T without bias, operands in ``compute`` precision; the output has that precision too.

    While training, the weight stays fp32 and is cast on the way; ``Titans.prepare`` casts it for good.
    """

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * (scale / inputs**0.5))
        self.compute = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.weight.to(self.compute))


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` `[..., in]` times ``weight`` `[out, in]` in the weight's precision, rows padded to full ROWS."""
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    count = rows.shape[0]
    missing = -count % ROWS
    if missing:
        rows = F.pad(rows, (0, 0, 0, missing))
    out = F.linear(rows, weight)
    if missing:
        out = out[:count]
    return out.view(*x.shape[:-1], weight.shape[0])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in the weight's precision (fp32); in a training step on a
    GPU in ``compute`` precision, that of the products that take it."""

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon
        self.compute = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if fusion.fuses(x):
            from mnemosyne.kernels.triton.train_norm import norm

            return norm(x, self.weight, self.epsilon, self.compute)
        x = x.to(self.weight.dtype)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight

    def add(self, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """x + more, and its norm; x in the weight's precision."""
        if fusion.fuses(x):
            from mnemosyne.kernels.triton.train_norm import add

            return add(x, more, self.weight, self.epsilon, self.compute)
        total = x + more
        return total, self(total)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, depth_scale: float) -> None:
        super().__init__()
        self.up = Dense(dim, 2 * hidden)
        self.down = Dense(hidden, dim, depth_scale)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if fusion.fuses(up):
            from mnemosyne.kernels.triton.train_swiglu import swiglu

            return self.down(swiglu(up))
        value, gate = up.chunk(2, -1)
        return self.down(elementwise.silu(gate) * value)
