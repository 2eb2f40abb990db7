"""What a memory rule is: the four choices of MIRAS (arXiv 2504.13173, section 3) as four values.

A rule is an architecture, an attentional bias (the inner loss), a retention gate (what is kept, and how
weights are made of it) and an algorithm. Chunk form, decode form and reference take a rule and know none by
name. Knows no gate's making, no module and no configuration.

What a session keeps of each memory matrix is X; the weights in use are W = retention.weights(X). Within a
chunk that begins at X_0, with every gradient taken at weights(X_0) and alpha the FORGET rate,

    S_t = eta_t S_{t-1} - theta_t clip(grad)          X_t = (1 - alpha_t) X_{t-1} + S_t
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """M(x) = [x +] [LN](W_L act(... act(W_1 x))), without affine parts (Titans, NeurIPS text, 3.3)."""

    residual: bool = True
    norm: bool = True


class AttentionalBias(ABC):
    """The inner loss of one token, a function of M(k) and v."""

    threshold: ClassVar[bool] = False
    """Whether the loss takes one positive number per token and head."""

    @abstractmethod
    def loss(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """Of ``output`` = M(k) and ``value`` `[..., d]`, ``threshold`` `[...]`: `[...]`. The reference
        differentiates it; nothing fast calls it."""

    @abstractmethod
    def gradient(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """Of ``loss`` with respect to ``output``, `[..., d]`."""

    def curvature(self, slope: Tensor) -> Tensor:
        """Largest second derivative of the loss where its gradient has the norm ``slope``, `[...]`."""
        return torch.full_like(slope, 2.0)


@dataclass(frozen=True)
class Square(AttentionalBias):
    """||M(k) - v||^2 (Titans eq. 12): no 1/2, so the gradient carries the factor 2."""

    def loss(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        return (output - value).square().sum(-1)

    def gradient(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        return 2 * (output - value)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Weight decay: what is kept is the weights themselves."""

    forgets: bool = True
    """Whether there is a forget gate at all; without one alpha is 0."""

    theta_limit: ClassVar[float] = 1.0
    """Largest theta_max that makes sense for what theta moves."""
    proportional: ClassVar[bool] = True
    """Within a chunk W_t = factor(X_0) X_t, so that reads need no weights of any one token."""

    def initial(self, *shape: int) -> Tensor:
        """X of one memory layer before anything was read, random, `[..., out, in]`."""
        return torch.randn(*shape) / shape[-1] ** 0.5

    def factor(self, kept: Tensor) -> Tensor | None:
        """W over X for X `[N, out, in]` at a chunk's start: `[N, 1, 1]`, or None for 1."""
        return None

    def slope(self, kept: Tensor) -> Tensor | None:
        """How far W `[N, out, in]` moves for a step of X, at most: `[N]`, or None for 1."""
        factor = self.factor(kept)
        return None if factor is None else factor[:, 0, 0]

    def weights(self, kept: Tensor) -> Tensor:
        """W `[..., out, in]` in use for X."""
        factor = self.factor(kept)
        return kept if factor is None else kept * factor


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Gradient descent token by token, gradients of a chunk at its start."""

    momentum: bool = False
    """Past surprise S carries on (Titans eq. 14); without it S is momentary and isn't part of the state."""
    clip: float | None = None
    """Largest norm of one token's gradient per head and memory layer (spec/memory.md 2); None: off."""


@dataclass(frozen=True, kw_only=True)
class MemoryRule:
    architecture: Architecture
    bias: AttentionalBias
    retention: Retention
    algorithm: Algorithm

    def initial(self, members: int, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """X of every memory layer of ``shapes`` (out, in) before anything was read, random, `[members, out,
        in]`: where training begins."""
        kept = [self.retention.initial(members, out, inn) for out, inn in shapes]
        if len(kept) > 1 and self.retention.proportional:
            # Keys have unit norm, so a plain fan-in scale leaves the hidden layer nearly silent and a token
            # could hardly be written in one step; and a memory that has read nothing should say little.
            kept[0] *= 2.0
            kept[-1] *= 0.1
        return kept

    def weights(self, kept: list[Tensor]) -> list[Tensor]:
        """W of every memory layer for its X."""
        return [self.retention.weights(x) for x in kept]


def linear_only(name: str, depth: int, architecture: Architecture) -> None:
    """Raise ValueError unless the memory is one matrix and nothing else."""
    if depth != 1:
        raise ValueError(f"the {name} rule's memory is one matrix: depth must be 1, got {depth}")
    if architecture.residual or architecture.norm:
        raise ValueError(f"the {name} rule's memory is one matrix: residual and norm must be false")
