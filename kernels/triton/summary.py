"""What ``learn`` told of every head, as a trace keeps it: all heads of a chunk and layer together.

Counterpart of ``engine.trace``. Heads are added up in one program, in one order. Knows no memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import BASE, CHUNKS, LAYER, cell_field

TRACED = 3
"""Numbers of a chunk and head, before two for each memory layer: sums over tokens of surprise and momentary
surprise, the gain (NaN where it isn't measured); then squares of how far M moved and of M before."""


@triton.jit(do_not_specialize=["count"])
def summary_kernel(
    trace,
    out,
    cells,
    count,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS_A_CELL: tl.constexpr,
    LAYERS: tl.constexpr,
    DEPTH: tl.constexpr,
    L: tl.constexpr,
):
    """Programs are (cell, chunk)."""
    cell = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if chunk >= cell_field(cells, CHUNKS, cell, count):
        return
    h = tl.arange(0, WIDTH)
    here = h < HEADS
    FIELDS: tl.constexpr = 3 + 2 * DEPTH
    at = trace + ((cell * CHUNKS_A_CELL + chunk) * HEADS + h) * FIELDS
    surprise = tl.sum(tl.load(at, mask=here, other=0.0), 0) / (HEADS * L)
    momentary = tl.sum(tl.load(at + 1, mask=here, other=0.0), 0) / (HEADS * L)
    gain = tl.load(at + 2, mask=here, other=float("-inf"))
    gain = tl.where(tl.sum((gain != gain).to(tl.int32), 0) > 0, float("nan"), tl.max(gain, 0))
    step = 0.0
    before = 0.0
    written = 0.0
    for i in tl.static_range(DEPTH):
        moved = tl.load(at + 3 + 2 * i, mask=here, other=0.0)
        step += tl.sum(moved, 0)
        before += tl.sum(tl.load(at + 4 + 2 * i, mask=here, other=0.0), 0)
        written += tl.sum((moved > 0).to(tl.float32), 0)
    layer = cell_field(cells, LAYER, cell, count)
    # By chunk of the call and layer.
    told = out + ((cell_field(cells, BASE, cell, count) // L + chunk) * LAYERS + layer) * 5
    tl.store(told, surprise)
    tl.store(told + 1, momentary)
    tl.store(told + 2, tl.sqrt(step / tl.maximum(before, 1e-30)))
    tl.store(told + 3, gain)
    tl.store(told + 4, written / (HEADS * DEPTH))


def summarize(trace: Tensor, out: Tensor, cells: Tensor, length: int) -> None:
    """From ``learn``'s trace, all heads together: fp32 ``out`` `[chunks of the call, layers, 5]`: surprise,
    momentary surprise, moved, gain, share of (head, memory layer) cells that changed."""
    _, chunks, heads, fields = trace.shape
    summary_kernel[(cells.shape[1], chunks)](
        trace,
        out,
        cells,
        cells.shape[1],
        HEADS=heads,
        WIDTH=triton.next_power_of_2(heads),
        CHUNKS_A_CELL=chunks,
        LAYERS=out.shape[1],
        DEPTH=(fields - TRACED) // 2,
        L=length,
        num_warps=1,
    )
