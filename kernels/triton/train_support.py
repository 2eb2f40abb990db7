"""What the kernels of a training step, ``train_*`` beside this file, can run. Needs no triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnemosyne.kernels.rules.rule import MemoryRule, Retention, Square
from mnemosyne.kernels.triton import support

HEAD_DIMS = (32, 64)
LENGTHS = (16, 32, 64)


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
