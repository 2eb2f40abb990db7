"""The end of a segment (MAC): what the memory has become is what the next one's h are read from. While a
session reads on, the cell that begins the next segment finds it where it is (``recall``); it is put aside
here only where the call ends. Knows no store and no attention."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, PLACE, STATE, TOKENS, cell_field, located


@triton.jit(do_not_specialize=["count"])
def segment_end_kernel(
    cells,
    count,
    from_offset,
    from_stride,
    to_offset,
    to_stride,
    SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNKS_A_SEGMENT: tl.constexpr,
    L: tl.constexpr,
):
    """Programs are (cell, piece of a head, head)."""
    cell = tl.program_id(0).to(tl.int64)
    chunks = cell_field(cells, CHUNKS, cell, count)
    place = cell_field(cells, PLACE, cell, count) // L
    if chunks == 0 or chunks * L < cell_field(cells, TOKENS, cell, count):
        return
    if (place + chunks) % CHUNKS_A_SEGMENT != 0:
        return
    layer = cell_field(cells, LAYER, cell, count)
    state = cell_field(cells, STATE, cell, count)
    head = tl.program_id(2) * SIZE
    source = located(state, from_offset + layer * from_stride, tl.float32) + head
    target = located(state, to_offset + layer * to_stride, tl.float32) + head
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    tl.store(target + i, tl.load(source + i))


def end_segments(
    memory: Sequence[tuple[int, int]],
    segment_memory: Sequence[tuple[int, int]],
    heads: int,
    size: int,
    segment: int,
    cells: Tensor,
    length: int,
) -> None:
    """M* := M where a cell ends its segment (MAC) and is its session's last of the call; ``size`` elements of
    one head's matrix."""
    piece = min(size & -size, 4096)
    for source, target in zip(memory, segment_memory, strict=True):
        segment_end_kernel[(cells.shape[1], size // piece, heads)](
            cells,
            cells.shape[1],
            *source,
            *target,
            SIZE=size,
            PIECE=piece,
            CHUNKS_A_SEGMENT=segment // length,
            L=length,
            num_warps=4,
        )
