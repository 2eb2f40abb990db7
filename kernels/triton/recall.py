"""Reads of a memory that stands still: MAC's h, from the memory as it was at the segment's start, for a
cell's chunks. Counterpart of ``network.retrieve`` and the norm per head after it. Knows no store."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, STATE, cell_field, located
from mnemosyne.kernels.triton.network import finish, gelu
from mnemosyne.kernels.triton.support import PRECISIONS


@triton.jit
def head_norm(x, weight, D: tl.constexpr, epsilon):
    """RMSNorm of rows of one head."""
    return x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + epsilon))[:, None] * weight[None, :]


@triton.jit(do_not_specialize=["count"])
def recall_kernel(
    q,
    out,
    norm,
    cells,
    count,
    hidden_offset,
    hidden_stride,
    last_offset,
    last_stride,
    epsilon,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs are (cell, tile of ROWS tokens, head)."""
    cell = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    if first >= cell_field(cells, CHUNKS, cell, count) * L:
        return
    head = tl.program_id(2)
    SIZE: tl.constexpr = D * H
    layer = cell_field(cells, LAYER, cell, count)
    state = cell_field(cells, STATE, cell, count)
    hidden = located(state, hidden_offset + layer * hidden_stride, tl.float32) + head * SIZE
    last = located(state, last_offset + layer * last_stride, tl.float32) + head * SIZE
    t = first + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    at = (cell * CELL + t)[:, None] * (HEADS * D) + head * D + d[None, :]
    qt = tl.load(q + at)
    if DEEP:
        z = tl.zeros([ROWS, D], tl.float32)
        for b in range(0, H, BLOCK):
            hb = b + tl.arange(0, BLOCK)
            w = tl.load(hidden + hb[:, None] * D + d[None, :]).to(qt.dtype)
            x, _ = gelu(tl.dot(qt, tl.trans(w), input_precision=PRECISION))
            w = tl.load(last + d[:, None] * H + hb[None, :]).to(qt.dtype)
            z = tl.dot(x.to(qt.dtype), tl.trans(w), z, input_precision=PRECISION)
    else:
        w = tl.load(last + d[:, None] * D + d[None, :]).to(qt.dtype)
        z = tl.dot(qt, tl.trans(w), input_precision=PRECISION)
    y = finish(z, qt.to(tl.float32), D, RESIDUAL, NORM)
    tl.store(out + at, head_norm(y, tl.load(norm + layer * D + d), D, epsilon))


def recall(
    q: Tensor,
    out: Tensor,
    norm: Tensor,
    memory: Sequence[tuple[int, int]],
    width: int,
    architecture: Architecture,
    epsilon: float,
    cells: Tensor,
    cell: int,
    length: int,
) -> None:
    """``out`` and ``q`` `[cells cell, dim]`; ``norm`` `[layers, D]`; ``memory`` where the state has each
    memory layer of M*, fp32: offset and layer stride in bytes; ``width`` of the hidden layer (head_dim
    without)."""
    head_dim = norm.shape[1]
    heads = q.shape[1] // head_dim
    tile = min(cell, 128)
    recall_kernel[(cells.shape[1], cell // tile, heads)](
        q,
        out,
        norm,
        cells,
        cells.shape[1],
        *memory[0],
        *memory[-1],
        epsilon,
        HEADS=heads,
        D=head_dim,
        H=width,
        CELL=cell,
        L=length,
        ROWS=tile,
        BLOCK=min(width, 64),
        DEEP=len(memory) > 1,
        RESIDUAL=architecture.residual,
        NORM=architecture.norm,
        PRECISION=PRECISIONS[q.dtype],
        num_warps=tile // 16 if tile >= 64 else 4,
        num_stages=2,
    )
