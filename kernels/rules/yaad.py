"""Yaad (MIRAS eq. 26): the Huber loss in the error's norm, weight decay, no momentum.

Written as spec/memory.md 4 has it: with e = M(k) - v the gradient is 2 e where |e| is at most the token's
threshold and 2 threshold e / |e| beyond, so that it is continuous and no outlier moves the memory by more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mnemosyne.kernels.rules.rule import Algorithm, Architecture, AttentionalBias, MemoryRule, Retention

TINY = 1e-30


@dataclass(frozen=True)
class Huber(AttentionalBias):
    threshold: ClassVar[bool] = True

    def loss(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        assert threshold is not None
        norm = torch.linalg.vector_norm(output - value, dim=-1)
        return torch.where(norm <= threshold, norm.square(), 2 * threshold * norm - threshold.square())

    def gradient(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        assert threshold is not None
        error = output - value
        norm = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
        return 2 * error * (threshold.unsqueeze(-1) / norm.clamp(min=TINY)).clamp(max=1.0)


def yaad(depth: int, architecture: Architecture, clip: float | None) -> MemoryRule:
    return MemoryRule(
        architecture=architecture, bias=Huber(), retention=Retention(), algorithm=Algorithm(clip=clip)
    )
