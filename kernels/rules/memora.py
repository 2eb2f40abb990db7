"""Memora (MIRAS eq. 27): retention by Kullback-Leibler divergence, so that every row of W is a distribution.

What is kept is z = log W up to a constant per row: z_t = (1 - alpha_t) z_{t-1} - theta_t grad l (with
respect to W), W = softmax(z). The paper takes one exact step a chunk and accumulates the rest linearly,
which leaves the simplex; here z moves linearly and W is made of it exactly, at chunk ends and in the reads
between.

alpha forgets towards uniform rows. A deep memory whose rows have all become alike can't tell its hidden units
apart again: over long streams alpha_max is better small (docs/experiments/memora.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mnemosyne.kernels.rules.rule import Algorithm, Architecture, MemoryRule, Retention, Square


@dataclass(frozen=True, kw_only=True)
class Simplex(Retention):
    theta_limit: ClassVar[float] = 100.0
    """theta moves a logarithm here: a weight of 1/64 changes by a 64th of what z does."""
    proportional: ClassVar[bool] = False

    def initial(self, *shape: int) -> Tensor:
        return 2 * torch.randn(*shape)  # rows that differ: a uniform one gives the mean of its input

    def slope(self, kept: Tensor) -> Tensor | None:
        return self.weights(kept).amax((-2, -1))  # of softmax, diag(w) - w w^T, at most the largest w

    def weights(self, kept: Tensor) -> Tensor:
        return torch.softmax(kept, -1)


def memora(depth: int, architecture: Architecture, clip: float | None) -> MemoryRule:
    return MemoryRule(
        architecture=architecture, bias=Square(), retention=Simplex(), algorithm=Algorithm(clip=clip)
    )
