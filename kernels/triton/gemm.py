"""Dense products of cells: each cell's rows times the weights of that cell's layer.

A cell is a run of one session's chunks in one layer; cells of a launch may belong to any layers and sessions
(``cells``). Every element of a result is one fixed sum: a program walks all of K in steps of 16 on Hopper's
tensor cores, adding in fp32, whatever the tile, the number of rows and what else is in the launch. So bits
depend on nobody else's rows, which a library that chooses its kernel by the number of rows can't promise.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mnemosyne.kernels.triton.cells import BASE, CHUNKS, LAYER, cell_field
from mnemosyne.kernels.triton.support import PRECISIONS


@triton.jit
def gemm_kernel(
    a,
    weight,
    out,
    residual,
    cells,
    count,
    N,
    K,
    CELL: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``a`` `[cells CELL, K]` and ``weight`` `[layers N, K]` by descriptors; programs are tiles of ROWS x
    COLUMNS, a cell's rows fastest, so that those that share weights run together.

    KIND: "store" to ``out``; "add" to the fp32 ``residual`` at the cell's base row; "swiglu": silu(gate) *
    value of a weight whose first half makes values and second half gates, to ``out``."""
    TILES: tl.constexpr = CELL // ROWS
    p = tl.program_id(0)
    tile = p % TILES
    columns = tl.cdiv(N, COLUMNS)
    column = (p // TILES) % columns * COLUMNS
    cell = p // TILES // columns
    chunks = cell_field(cells, CHUNKS, cell, count).to(tl.int32)
    if tile * ROWS >= chunks * L:
        return
    layer = cell_field(cells, LAYER, cell, count).to(tl.int32)
    row = cell * CELL + tile * ROWS
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    gate = acc
    for k in range(0, K, DEPTH):
        x = a.load([row, k])
        if KIND == "swiglu":
            first = layer * 2 * N + column
            acc = tl.dot(x, weight.load([first, k]).T, acc, input_precision=PRECISION)
            gate = tl.dot(x, weight.load([first + N, k]).T, gate, input_precision=PRECISION)
        else:
            acc = tl.dot(x, weight.load([layer * N + column, k]).T, acc, input_precision=PRECISION)
    if KIND == "swiglu":
        acc = acc * gate / (1.0 + tl.exp(-gate))
    c = column + tl.arange(0, COLUMNS)
    t = tile * ROWS + tl.arange(0, ROWS)
    here = (t < chunks * L)[:, None] & (c < N)[None, :]
    if KIND == "add":
        base = cell_field(cells, BASE, cell, count)
        at = (base + t)[:, None] * N + c[None, :]
        tl.store(residual + at, tl.load(residual + at, mask=here) + acc, mask=here)
    else:
        at = (cell.to(tl.int64) * CELL + t)[:, None] * N + c[None, :]
        tl.store(out + at, acc, mask=here)


def tiles(cell: int, columns: int, dtype: torch.dtype, kind: str, count: int) -> dict[str, int]:
    """Tile and launch of ``count`` cells with ``columns`` results a row; no bit depends on them."""
    rows = min(cell, 128)
    if dtype != torch.bfloat16:
        return {"ROWS": rows, "COLUMNS": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 2}
    if rows < 128:
        # Few rows: weights are what is read, so many small programs read them together.
        tile = {"ROWS": rows, "DEPTH": 128, "num_warps": 4}
        if count == 1 and columns <= 2048:
            return tile | {"COLUMNS": 16, "num_stages": 8}
        return tile | {"COLUMNS": 32 if count == 1 or columns < 4096 else 64, "num_stages": 4}
    tile = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
    if kind == "swiglu":
        return tile | {"num_stages": 4}
    if kind == "add":
        return tile | ({"COLUMNS": 256, "num_stages": 4} if columns >= 1536 else {"num_warps": 4})
    return tile


def gemm(
    a: Tensor, weight: Tensor, cells: Tensor, cell: int, length: int, out: Tensor, kind: str = "store"
) -> None:
    """``a`` `[cells cell, K]` times ``weight`` `[layers, N, K]` ("swiglu": `[layers, 2 N, K]`) into ``out``.

    ``cells`` as ``cells.py`` has them, each with room for ``cell`` rows, in chunks of ``length``. ``out`` is
    `[cells cell, N]`, or for "add" fp32 `[rows, N]`, which is added to.
    """
    layers, rows, K = weight.shape
    N = rows // 2 if kind == "swiglu" else rows
    count = cells.shape[1]
    options: dict[str, Any] = tiles(cell, N, a.dtype, kind, count)
    block = [options["COLUMNS"], options["DEPTH"]]
    grid = (count * (cell // options["ROWS"]) * triton.cdiv(N, options["COLUMNS"]),)
    gemm_kernel[grid](
        TensorDescriptor.from_tensor(a, [options["ROWS"], options["DEPTH"]]),
        TensorDescriptor.from_tensor(weight.view(layers * rows, K), block),
        out,
        out,
        cells,
        count,
        N,
        K,
        CELL=cell,
        L=length,
        KIND=kind,
        PRECISION=PRECISIONS[a.dtype],
        **options,
    )
