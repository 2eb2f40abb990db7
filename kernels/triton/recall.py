"""Reads of a memory that stands still: MAC's h, from the memory as it was at the segment's start, for a
cell's chunks, with the norm per head after it. Counterpart of ``network.retrieve``. Knows no store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, PLACE, STATE, cell_field, located
from mnemosyne.kernels.triton.network import finish, gelu
from mnemosyne.kernels.triton.support import PRECISIONS

PROGRAMS = 264
"""As many fill a GPU, each with all tokens of a cell: two a multiprocessor."""
SHARE = 128
"""Tokens of a program where there are fewer."""
BLOCK, REGISTERS = 128, 168
"""Hidden units at once, and of a thread: three programs share a multiprocessor."""


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
    start_hidden_offset,
    start_hidden_stride,
    start_last_offset,
    start_last_stride,
    hidden_offset,
    hidden_stride,
    last_offset,
    last_stride,
    epsilon,
    SEGMENT: tl.constexpr,
    KEEPS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    DEEP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    ROUGH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs are (cell, head, run of SHARE tokens); a run goes by ROWS tokens, and the memory stays on the
    chip meanwhile."""
    cell = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.program_id(2) * SHARE
    chunks = cell_field(cells, CHUNKS, cell, count)
    if first >= chunks * L:
        return
    SIZE: tl.constexpr = D * H
    layer = cell_field(cells, LAYER, cell, count)
    state = cell_field(cells, STATE, cell, count)
    start_hidden = located(state, start_hidden_offset + layer * start_hidden_stride, tl.float32) + head * SIZE
    start_last = located(state, start_last_offset + layer * start_last_stride, tl.float32) + head * SIZE
    # Where a segment begins M is what M* becomes.
    begins = cell_field(cells, PLACE, cell, count) % SEGMENT == 0
    hidden, last = start_hidden, start_last
    if begins:
        hidden = located(state, hidden_offset + layer * hidden_stride, tl.float32) + head * SIZE
        last = located(state, last_offset + layer * last_stride, tl.float32) + head * SIZE
    d = tl.arange(0, D)
    KIND: tl.constexpr = q.dtype.element_ty
    BLOCKS: tl.constexpr = H // BLOCK
    into = ()
    out_of = ()
    for i in tl.static_range(BLOCKS):
        hb = i * BLOCK + tl.arange(0, BLOCK)
        if DEEP:
            into += (tl.trans(tl.load(hidden + hb[:, None] * D + d[None, :]).to(KIND)),)
        out_of += (tl.trans(tl.load(last + d[:, None] * H + hb[None, :]).to(KIND)),)
    scale = tl.load(norm + layer * D + d)
    rows = (cell * CELL + tl.arange(0, ROWS))[:, None] * (HEADS * D) + head * D + d[None, :]
    end = tl.minimum(first + SHARE, chunks * L).to(tl.int32)
    ahead = tl.load(q + rows + first * (HEADS * D))
    for t in range(first, end, ROWS):
        qt = ahead
        # The next rows come while these are computed; the last ones come again.
        ahead = tl.load(q + rows + tl.minimum(t + ROWS, end - ROWS) * (HEADS * D))
        if DEEP:
            z = tl.zeros([ROWS, D], tl.float32)
            for i in tl.static_range(BLOCKS):
                made, _ = gelu(tl.dot(qt, into[i], input_precision=PRECISION), ROUGH)
                z = tl.dot(made.to(KIND), out_of[i], z, input_precision=PRECISION)
        else:
            z = tl.dot(qt, out_of[0], input_precision=PRECISION)
        y = finish(z, qt.to(tl.float32), D, RESIDUAL, NORM)
        tl.store(out + rows + t * (HEADS * D), head_norm(y, scale, D, epsilon))
    if KEEPS and begins and first == 0 and chunks * L < SEGMENT:
        # For the cells after it.
        at = tl.arange(0, PIECE)
        for done in range(0, SIZE, PIECE):
            tl.store(start_last + done + at, tl.load(last + done + at))
            if DEEP:
                tl.store(start_hidden + done + at, tl.load(hidden + done + at))


def recall(
    q: Tensor,
    out: Tensor,
    norm: Tensor,
    start: Sequence[tuple[int, int]],
    memory: Sequence[tuple[int, int]],
    segment: int,
    keeps: bool,
    width: int,
    architecture: Architecture,
    epsilon: float,
    cells: Tensor,
    cell: int,
    length: int,
) -> None:
    """``out`` `[cells cell, dim]` of queries ``q`` as many; ``norm`` `[layers, D]`.

    ``start`` where the state has each memory layer of M*, fp32: offset and layer stride in bytes, ``memory``
    of M; ``keeps``: whether M is put aside as M* by a cell that begins a segment and leaves it open;
    ``width`` of the hidden layer (head_dim without).
    """
    head_dim = norm.shape[1]
    heads, count, size = out.shape[1] // head_dim, cells.shape[1], head_dim * width
    # Few cells share out their tokens; a token's bits don't tell.
    share = cell if count * heads >= PROGRAMS else min(cell, SHARE)
    recall_kernel[(count, heads, cell // share)](
        q,
        out,
        norm,
        cells,
        count,
        *start[0],
        *start[-1],
        *memory[0],
        *memory[-1],
        epsilon,
        SEGMENT=segment,
        KEEPS=keeps,
        HEADS=heads,
        D=head_dim,
        H=width,
        CELL=cell,
        L=length,
        SHARE=share,
        ROWS=length,
        BLOCK=min(width, BLOCK),
        PIECE=min(size & -size, 2048),
        DEEP=len(memory) > 1,
        RESIDUAL=architecture.residual,
        NORM=architecture.norm,
        ROUGH=q.dtype == torch.bfloat16,
        PRECISION=PRECISIONS[q.dtype],
        num_warps=4,
        num_stages=1,
        maxnreg=REGISTERS,
    )
