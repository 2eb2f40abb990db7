"""Moneta (MIRAS eq. 24-25): the loss ||e||_p^p, and weights A / ||A||_q^(q-2) of what is kept, A.

Sign and absolute value are smoothed as the paper says, so that the outer loss can be differentiated. The
norm is that of the chunk's start, per head and matrix.

Forgetting shrinks A, and with the paper's bare norm W = A / ||A||^(q-2) grows without bound as A goes to 0,
for every q above 2. Here eps in (||A||_q + eps)^(q-2) is of A's own scale, 1, and not a guard against
division by zero: W is never larger than A, vanishes with it, and is the paper's to within a constant where
A is large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.kernels import elementwise
from mnemosyne.kernels.rules.rule import Algorithm, Architecture, AttentionalBias, MemoryRule, Retention

SHARPNESS = 10.0
"""Sign(x) is tanh(10 x)."""
SMOOTH = 1e-6
"""|x| is sqrt(x^2 + 1e-6)."""
FLOOR = 1.0
"""eps of the norm, see above."""
TINY = 1e-30


@dataclass(frozen=True)
class Power(AttentionalBias):
    """||e||_p^p, e = M(k) - v."""

    p: float

    def loss(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """A loss with the smoothed gradient: the smoothing has no integral in closed form, so its value at
        the output is held fixed."""
        slope = self.gradient(output, value, None).detach()
        return (slope * output).sum(-1)

    def gradient(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        error = output - value
        sign = elementwise.tanh(SHARPNESS * error)
        return self.p * sign * elementwise.power(error.square() + SMOOTH, (self.p - 1) / 2)

    def curvature(self, slope: Tensor) -> Tensor:
        if self.p == 1:
            return torch.zeros_like(slope)
        # p (p - 1) |e|^(p - 2), with |e| as its largest entry and so from p |e|^(p - 1) = slope.
        error = elementwise.power(slope / self.p + TINY, 1 / (self.p - 1))
        return self.p * (self.p - 1) * elementwise.power(error + SMOOTH, self.p - 2)


@dataclass(frozen=True, kw_only=True)
class PowerNorm(Retention):
    q: float

    def factor(self, kept: Tensor) -> Tensor | None:
        if self.q == 2:
            return None
        # Row by row and then the rows: the shape of each sum is the matrix's own, whatever the batch.
        total = elementwise.power(kept.abs(), self.q).sum(-1).sum(-1)
        norm = elementwise.power(total + TINY, 1 / self.q)
        return elementwise.power(norm + FLOOR, 2 - self.q)[..., None, None]


def moneta(
    depth: int, architecture: Architecture, clip: float | None, p: float = 3.0, q: float = 4.0
) -> MemoryRule:
    if p < 1:
        raise ValueError(f"moneta's p must be at least 1, got {p}")
    if q < 2:
        raise ValueError(f"moneta's q must be at least 2, got {q}")
    return MemoryRule(
        architecture=architecture, bias=Power(p), retention=PowerNorm(q=q), algorithm=Algorithm(clip=clip)
    )
