"""What the memories are asked to store: random pairs, and pairs of a map that has a structure.

Owns the drawing of data; seeded, so that the same numbers come again on one kind of device. Knows no memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnemosyne.kernels.network import unit


def generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, device=g.device)


def keys(g: torch.Generator, *shape: int) -> Tensor:
    """Random directions of unit norm."""
    return unit(normal(g, *shape))


def teacher(g: torch.Generator, x: Tensor, hidden: int) -> Tensor:
    """Values of ``x`` `[B, H, T, d]` under a tanh network of its own for every stream and member, scaled to
    about unit variance."""
    B, H, _, d = x.shape
    first = normal(g, B, H, d, hidden) * 2
    second = normal(g, B, H, hidden, d) / hidden**0.5
    return torch.tanh(x @ first) @ second * 1.5
