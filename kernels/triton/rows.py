"""What happens to whole rows of a cell between its products: norms, the block's gate, the residual sum.

A program takes a few rows of one cell; sums run over one row, in fp32. Knows no session and no memory.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import BASE, CHUNKS, LAYER, cell_field

ROWS, WARPS = 4, 4
Kind = Literal["norm", "between", "gate", "paper", "add"]


class Operands(NamedTuple):
    """What a kind of ``rows`` takes besides the stream."""

    y: Tensor | None = None
    """`[cells cell, N]`."""
    m: Tensor | None = None
    norm_y: Tensor | None = None
    """`[layers, N]`."""
    norm_m: Tensor | None = None


NOTHING = Operands()


@triton.jit
def normed(x, scale, N, epsilon):
    """RMSNorm of rows `[rows, WIDTH]`, of which N columns count."""
    return x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / N + epsilon))[:, None] * scale[None, :]


@triton.jit
def _normed(x, weight, layer, column, inside, N, epsilon):
    """By the layer's weight."""
    return normed(x, tl.load(weight + layer * N + column, mask=inside, other=0.0), N, epsilon)


@triton.jit(do_not_specialize=["count"])
def rows_kernel(
    residual,
    y,
    m,
    out,
    weight,
    norm_y,
    norm_m,
    cells,
    count,
    epsilon,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
):
    """``out`` is the normed row that the next product takes; ``residual`` is by token, the rest by cell."""
    cell = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    chunks = cell_field(cells, CHUNKS, cell, count)
    if tl.program_id(1) * ROWS >= chunks * L:
        return
    layer = cell_field(cells, LAYER, cell, count)
    base = cell_field(cells, BASE, cell, count)
    column = tl.arange(0, WIDTH)
    inside = column < N
    here = (t < chunks * L)[:, None] & inside[None, :]
    at = (cell * CELL + t)[:, None] * N + column[None, :]
    token = (base + t)[:, None] * N + column[None, :]
    if KIND == "between":
        x = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    else:
        x = tl.load(residual + token, mask=here, other=0.0)
    if KIND == "add":
        x += tl.load(m + at, mask=here, other=0.0).to(tl.float32)
    if KIND == "gate" or KIND == "paper":
        from_y = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        from_m = tl.load(m + at, mask=here, other=0.0).to(tl.float32)
        from_y = _normed(from_y, norm_y, layer, column, inside, N, epsilon)
        from_m = _normed(from_m, norm_m, layer, column, inside, N, epsilon)
        x += from_y / (1.0 + tl.exp(-from_m))
        if KIND == "gate":
            x += from_m
    if KIND != "norm" and KIND != "between":
        tl.store(residual + token, x, mask=here)
    tl.store(out + at, _normed(x, weight, layer, column, inside, N, epsilon), mask=here)


def rows(
    kind: Kind,
    residual: Tensor,
    out: Tensor,
    weight: Tensor,
    cells: Tensor,
    cell: int,
    length: int,
    epsilon: float,
    operands: Operands = NOTHING,
) -> None:
    """RMSNorm by ``weight`` `[layers, N]` to ``out`` `[cells cell, N]`, of

    - "norm": the residual stream ``residual`` `[tokens, N]`, fp32;
    - "between": ``y`` `[cells cell, N]`;
    - "add": the stream after ``m`` was added to it;
    - "gate", "paper": the stream after gate(y, m) of MAG and MAC was added to it (``engine.mixers.Gated``).
    """
    N = out.shape[1]
    y, m, norm_y, norm_m = operands
    rows_kernel[(cells.shape[1], triton.cdiv(cell, ROWS))](
        residual,
        out if y is None else y,
        out if m is None else m,
        out,
        weight,
        weight if norm_y is None else norm_y,
        weight if norm_m is None else norm_m,
        cells,
        cells.shape[1],
        epsilon,
        N=N,
        WIDTH=triton.next_power_of_2(N),
        CELL=cell,
        L=length,
        ROWS=ROWS,
        KIND=kind,
        num_warps=WARPS,
    )
