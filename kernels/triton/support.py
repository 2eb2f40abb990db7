"""What the kernels beside this file can run, and in which precision. Needs no triton."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mnemosyne.kernels.rules.rule import MemoryRule, Retention, Square
from mnemosyne.kernels.rules.yaad import Huber

PRECISIONS = {torch.float32: "tf32x3", torch.bfloat16: "ieee"}
"""How a product takes operands of each type: fp32 in three passes of the tensor cores, bf16 as they are. Sums
are fp32 either way."""
HEAD_DIMS = (32, 64, 128)
WIDTHS = (64, 128, 256)
"""None below 64: a read in blocks of 32 hidden units gave wrong results with Triton 3.6; why isn't known."""
LENGTHS = range(16, 129, 16)
LARGEST = {torch.float32: 64, torch.bfloat16: 128}
"""head_dim and chunk beyond which a program's shared memory doesn't suffice."""
NOWHERE = "a machine without triton, a C compiler for it, or a Hopper GPU"
CELL_HEAD_DIMS = (64,)
CELL_CHUNK = 64
"""Of cells and steps: what was tested on a GPU."""


class Shape(NamedTuple):
    """Sizes of a model that its kernels depend on."""

    dim: int
    head_dim: int
    ffn: int
    depth: int
    width: int
    """Of the memory's hidden layer."""
    chunk: int
    cell: int
    """Tokens that a cell has room for."""


def missing(x: Tensor, memory: Sequence[Tensor], rule: MemoryRule) -> str | None:
    """What keeps the kernels from keys or queries ``x`` `[B, H, n, L, d]` and this memory; None: nothing."""
    length, head_dim = x.shape[-2:]
    width = memory[-1].shape[-1]
    if type(rule.retention) is not Retention or not isinstance(rule.bias, Square | Huber):
        return f"a rule of {type(rule.bias).__name__} and {type(rule.retention).__name__}"
    if len(memory) > 2:
        return f"memory depth {len(memory)}"
    if x.dtype not in PRECISIONS or memory[0].dtype != torch.float32:
        return f"{x.dtype} on a memory in {memory[0].dtype}"
    deep = len(memory) == 2
    if head_dim not in HEAD_DIMS or length not in LENGTHS or (deep and width not in WIDTHS):
        return f"head_dim {head_dim}, hidden width {width} and chunk {length}"
    if max(head_dim, length) > LARGEST[x.dtype]:
        return f"head_dim {head_dim} and chunk {length} in {x.dtype}"
    if not _hopper(x.device):
        return NOWHERE
    return None


def takes(theta: Tensor) -> bool:
    """Whether the decays of gates like ``theta`` `[..., L]` can be made on its device."""
    return theta.dtype == torch.float32 and theta.shape[-1] <= LENGTHS[-1] and _hopper(theta.device)


@cache
def _hopper(device: torch.device) -> bool:
    """Whether kernels can be compiled for it here. Triton links their launchers with a C compiler."""
    if torch.cuda.get_device_capability(device)[0] != 9 or importlib.util.find_spec("triton") is None:
        return False
    return any(shutil.which(name) for name in (os.environ.get("CC") or "", "gcc", "clang"))


def unserved(rule: MemoryRule, shape: Shape, compute: torch.dtype, device: torch.device) -> str | None:
    """What keeps a whole model from the kernels of cells and steps; None: nothing."""
    if type(rule.retention) is not Retention or not rule.retention.forgets:
        return f"a rule of {type(rule.retention).__name__} without a forget gate"
    if not isinstance(rule.bias, Square) or not rule.algorithm.momentum:
        return f"a rule of {type(rule.bias).__name__} without momentum"
    if shape.depth > 2:
        return f"memory depth {shape.depth}"
    if compute != torch.bfloat16:
        return f"{compute} on a GPU"
    deep = shape.depth == 2
    if (
        shape.head_dim not in CELL_HEAD_DIMS
        or shape.chunk != CELL_CHUNK
        or (deep and shape.width not in WIDTHS)
    ):
        return f"head_dim {shape.head_dim}, hidden width {shape.width} and chunk {shape.chunk}"
    if shape.cell % 128 or shape.dim % 64 or shape.ffn % 64:
        return f"dim {shape.dim}, ffn {shape.ffn} and cells of {shape.cell} tokens"
    if not _hopper(device):
        return NOWHERE
    return None
