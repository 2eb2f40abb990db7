"""What a cell of one unfinished chunk leaves for the tokens after it, besides the memory's cache (``learn``)
and the tails (``streams``): its keys and values, and the decays after its last token. Knows no tensor by
name."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cell_gates import VECTORS, A, CellDecays, S, W
from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, OPEN, TOKENS, cell_field, located


@triton.jit(do_not_specialize=["count"])
def open_rows_kernel(
    x,
    cells,
    count,
    N,
    column,
    offset,
    stride,
    D: tl.constexpr,
    L: tl.constexpr,
):
    """Programs are (cell, head)."""
    cell = tl.program_id(0).to(tl.int64)
    if cell_field(cells, CHUNKS, cell, count) == 0:
        return
    head = tl.program_id(1)
    layer = cell_field(cells, LAYER, cell, count)
    kept = located(cell_field(cells, OPEN, cell, count), offset + layer * stride, x.dtype.element_ty)
    t = tl.arange(0, L)
    d = tl.arange(0, D)
    rows = tl.load(x + (cell * L + t)[:, None] * N + column + head * D + d[None, :])
    tl.store(kept + head * L * D + t[:, None] * D + d[None, :], rows)


def open_rows(
    x: Tensor, column: int, kept: tuple[int, int], cells: Tensor, length: int, heads: int, dim: int
) -> None:
    """Heads of keys or values, ``dim`` columns of ``x`` from ``column`` on, to ``kept`` of the open chunk."""
    open_rows_kernel[(cells.shape[1], heads)](
        x, cells, cells.shape[1], x.shape[1], column, *kept, D=dim // heads, L=length, num_warps=4
    )


@triton.jit(do_not_specialize=["count"])
def open_decay_kernel(
    vectors,
    cells,
    count,
    decay_offset,
    decay_stride,
    rows_offset,
    rows_stride,
    GATES: tl.constexpr,
    L: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Programs are (cell, head's memory layer)."""
    cell = tl.program_id(0).to(tl.int64)
    if cell_field(cells, CHUNKS, cell, count) == 0:
        return
    gated = tl.program_id(1)
    layer = cell_field(cells, LAYER, cell, count)
    last = cell_field(cells, TOKENS, cell, count) - 1
    open_chunk = cell_field(cells, OPEN, cell, count)
    decay = located(open_chunk, decay_offset + layer * decay_stride, tl.float32)
    rows = located(open_chunk, rows_offset + layer * rows_stride, tl.float32)
    t = tl.arange(0, L)
    made = vectors + (cell * GATES + gated) * VECTORS * L
    tl.store(rows + gated * L + t, tl.load(made + W * L + t))
    tl.store(rows + (GATES + gated) * L + t, tl.load(made + S * L + t))
    for i in tl.static_range(3):
        tl.store(decay + i * GATES + gated, tl.load(made + (A + i) * L + last))


def open_decays(
    decays: CellDecays, decay: tuple[int, int], rows: tuple[int, int], cells: Tensor, length: int
) -> None:
    """A, F, E after the last token, and its rows of G and P, to the open chunk's ``decay`` and ``rows``."""
    _, _, heads, depth, _, _ = decays.G.shape
    open_decay_kernel[(cells.shape[1], heads * depth)](
        decays.vectors,
        cells,
        cells.shape[1],
        *decay,
        *rows,
        GATES=heads * depth,
        L=length,
        VECTORS=VECTORS,
        num_warps=1,
    )
