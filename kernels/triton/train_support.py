"""What the kernels of a training step, ``train_*`` beside this file, can run. Needs no triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnemosyne.kernels.rules.rule import MemoryRule, Retention, Square
from mnemosyne.kernels.triton import support

HEAD_DIMS = (32, 64)
LENGTHS = (16, 32, 64)
WIDEST = 8192
"""Elements of a row that a program holds at once."""


def missing(x: Tensor, memory: Sequence[Tensor], rule: MemoryRule) -> str | None:
    """What keeps the kernels from keys or queries ``x`` `[B, H, n, L, d]` and this memory; None: nothing."""
    length, head_dim = x.shape[-2:]
    if type(rule.retention) is not Retention or not isinstance(rule.bias, Square):
        return f"training a rule of {type(rule.bias).__name__} and {type(rule.retention).__name__}"
    if len(memory) > 1:
        return f"training memory depth {len(memory)}"
    if memory[0].dtype != torch.float32:
        return f"training a memory in {memory[0].dtype}"
    if head_dim not in HEAD_DIMS or length not in LENGTHS:
        return f"training head_dim {head_dim} and chunk {length}"
    if not support.takes(memory[0]):
        return support.NOWHERE
    return None


def takes(theta: Tensor) -> bool:
    """Whether the decays of gates like ``theta`` `[..., L]` can be made with gradients on its device."""
    return theta.shape[-1] in LENGTHS and support.takes(theta)


def rows(x: Tensor) -> bool:
    """Whether chains of elementwise operations on rows like ``x`` `[..., width]` can run on its device."""
    known = x.dtype in support.PRECISIONS and 0 < x.shape[-1] <= WIDEST and x.numel() > 0
    return known and support._hopper(x.device)


def attends(q: Tensor, k: Tensor, block: int) -> bool:
    """Whether windows of ``k`` `[B, H, W + T, d]` can be attended to by ``q`` in blocks on its device."""
    known = q.shape[-1] in HEAD_DIMS and block in LENGTHS and q.dtype == k.dtype
    return known and rows(q)


def made(beside: Tensor, *shape: int) -> Tensor:
    """Room in fp32 on the device of ``beside``, of its shape where none is given."""
    return torch.empty(shape or beside.shape, dtype=torch.float32, device=beside.device)


def precision() -> str:
    """Of products of fp32 operands: in one pass of the tensor cores where torch may do so, else as exact as
    elsewhere."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else support.PRECISIONS[torch.float32]


def precision_of(x: Tensor) -> str:
    """Of products of operands like ``x``."""
    return precision() if x.dtype == torch.float32 else support.PRECISIONS[x.dtype]


class Form(NamedTuple):
    """What kernels are made for, beside the sizes."""

    momentum: bool
    residual: bool
    norm: bool
    clip: float | None
    precision: str

    def constants(self) -> dict[str, Any]:
        return {
            "MOMENTUM": self.momentum,
            "RESIDUAL": self.residual,
            "NORM": self.norm,
            "PRECISION": self.precision,
        }


def form_of(rule: MemoryRule) -> Form:
    shape = rule.architecture
    return Form(rule.algorithm.momentum, shape.residual, shape.norm, rule.algorithm.clip, precision())
