"""Attention of a cell's chunks over a segment (MAC) or a sliding window (MAG, MAL), with persistent tokens.

Counterpart of ``kernels.attention``. A program answers one chunk of one head: it walks persistent tokens,
what the session's state holds and the cell's own rows in tiles of one chunk, in the order of their positions,
so its bits don't depend on where the cell begins. Knows no projection.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, PLACE, STATE, cell_field, located
from mnemosyne.kernels.triton.support import PRECISIONS


class Held(NamedTuple):
    """Where the state holds keys and values `[layers, H, C, D]`: offset and layer stride in bytes."""

    keys: tuple[int, int]
    values: tuple[int, int]


@triton.jit
def _take(q, kt, vt, seen, top, total, acc, scale, PRECISION: tl.constexpr):
    """Online softmax over one more tile: keys ``kt`` `[D, keys]`, values ``vt`` `[keys, D]`."""
    scores = tl.dot(q, kt, input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, -1e30)
    highest = tl.maximum(top, tl.max(scores, 1))
    weights = tl.where(seen, tl.exp2(scores - highest[:, None]), 0.0)
    shrink = tl.exp2(top - highest)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(vt.dtype), vt, acc * shrink[:, None], input_precision=PRECISION)
    return highest, total, acc


@triton.jit
def _inside(query, key, WINDOW: tl.constexpr):
    """Which keys a query may see, by position; WINDOW 0: all up to its own."""
    seen = query[:, None] >= key[None, :]
    if WINDOW:
        seen = seen & (query[:, None] - key[None, :] < WINDOW)
    return seen


@triton.jit(do_not_specialize=["count"])
def attention_kernel(
    x,
    h,
    persistent_k,
    persistent_v,
    out,
    cells,
    count,
    N,
    column,
    keys_offset,
    keys_stride,
    values_offset,
    values_stride,
    h_keys_offset,
    h_keys_stride,
    h_values_offset,
    h_values_stride,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    HELD: tl.constexpr,
    SEGMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x`` holds q, k, v from ``column`` on; ``h`` k and v of the memory's answers, where SEGMENT. The state
    holds HELD rows: those of the segment, from its first on, or the window's, the newest last. ``scale``
    takes log2 e too."""
    cell = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if chunk >= cell_field(cells, CHUNKS, cell, count):
        return
    head = tl.program_id(2)
    DIM: tl.constexpr = HEADS * D
    KIND: tl.constexpr = x.dtype.element_ty
    WINDOW: tl.constexpr = 0 if SEGMENT else HELD
    layer = cell_field(cells, LAYER, cell, count)
    place = cell_field(cells, PLACE, cell, count)
    state = cell_field(cells, STATE, cell, count)
    row = tl.arange(0, L)
    d = tl.arange(0, D)
    own = x + cell * CELL * N + column + head * D
    query = chunk * L + row
    q = tl.load(own + query[:, None] * N + d[None, :])
    top = tl.full([L], -1e30, tl.float32)
    total = tl.zeros([L], tl.float32)
    acc = tl.zeros([L, D], tl.float32)

    for p in range(0, P, L):
        at = (layer * HEADS + head) * P * D + p * D
        there = p + row < P
        kt = tl.load(persistent_k + at + row[None, :] * D + d[:, None], mask=there[None, :], other=0.0)
        vt = tl.load(persistent_v + at + row[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        seen = there[None, :] & (row >= 0)[:, None]
        top, total, acc = _take(q, kt, vt, seen, top, total, acc, scale, PRECISION)

    # Chunks before the cell, counted from its first: as many as the segment or the window has.
    if SEGMENT:
        older = (place % HELD // L).to(tl.int32)
        first = -older
    else:
        older = tl.full([], HELD // L, tl.int32)
        first = tl.maximum(chunk - HELD // L, -(tl.minimum(place, HELD) // L).to(tl.int32))
    SIZE: tl.constexpr = KIND.primitive_bitwidth // 8
    held = head * HELD * D * SIZE
    held_k = state + keys_offset + layer * keys_stride + held
    held_v = state + values_offset + layer * values_stride + held
    own_k = (own + DIM).to(tl.int64)
    own_v = (own + 2 * DIM).to(tl.int64)
    if SEGMENT:
        held_hk = state + h_keys_offset + layer * h_keys_stride + held
        held_hv = state + h_values_offset + layer * h_values_stride + held
        own_hk = (h + cell * CELL * 2 * DIM + head * D).to(tl.int64)
        own_hv = own_hk + DIM * SIZE
    for j in range(first, chunk + 1):
        # One body for rows of the state and rows of the cell: two would be compiled to other sums.
        before = j < 0
        at = tl.where(before, (older + j) * L * D, 0) * SIZE
        seen = _inside(query, j * L + row, WINDOW)
        if SEGMENT:
            wide = tl.where(before, D, 2 * DIM)
            there = tl.where(before, 0, j * L * 2 * DIM * SIZE)
            keys = located(tl.where(before, held_hk, own_hk), at + there, KIND)
            values = located(tl.where(before, held_hv, own_hv), at + there, KIND)
            kt = tl.load(keys + row[None, :] * wide + d[:, None])
            vt = tl.load(values + row[:, None] * wide + d[None, :])
            top, total, acc = _take(q, kt, vt, seen, top, total, acc, scale, PRECISION)
        wide = tl.where(before, D, N)
        there = tl.where(before, 0, j * L * N * SIZE)
        keys = located(tl.where(before, held_k, own_k), at + there, KIND)
        values = located(tl.where(before, held_v, own_v), at + there, KIND)
        kt = tl.load(keys + row[None, :] * wide + d[:, None])
        vt = tl.load(values + row[:, None] * wide + d[None, :])
        top, total, acc = _take(q, kt, vt, seen, top, total, acc, scale, PRECISION)
    y = acc / total[:, None]
    tl.store(out + (cell * CELL + query)[:, None] * DIM + head * D + d[None, :], y)


def attend(
    x: Tensor,
    column: int,
    h: Tensor | None,
    persistent_k: Tensor,
    persistent_v: Tensor,
    out: Tensor,
    held: Held,
    held_h: Held | None,
    rows: int,
    cells: Tensor,
    cell: int,
    length: int,
) -> None:
    """Attention's output before its projection, `[cells cell, dim]`.

    ``x`` `[cells cell, N]` has q, k, v, rotated, from ``column`` on; ``h`` `[cells cell, 2 dim]` k and v of
    what the memory answered (MAC: ``held_h`` then says where the state has those of the segment before).
    ``persistent_*`` `[layers, H, P, D]`; ``rows`` that the state holds: the segment or the window.
    """
    _, heads, persistent, head_dim = persistent_k.shape
    attention_kernel[(cells.shape[1], cell // length, heads)](
        x,
        x if h is None else h,
        persistent_k,
        persistent_v,
        out,
        cells,
        cells.shape[1],
        x.shape[1],
        column,
        *held.keys,
        *held.values,
        *(held if held_h is None else held_h).keys,
        *(held if held_h is None else held_h).values,
        head_dim**-0.5 * 1.4426950408889634,
        HEADS=heads,
        D=head_dim,
        P=persistent,
        CELL=cell,
        L=length,
        HELD=rows,
        SEGMENT=held_h is not None,
        PRECISION=PRECISIONS[x.dtype],
        num_warps=4,
        num_stages=2,
    )


@triton.jit(do_not_specialize=["count"])
def keep_kernel(
    x,
    cells,
    count,
    N,
    keys_column,
    values_column,
    keys_offset,
    keys_stride,
    values_offset,
    values_stride,
    D: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    HELD: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Programs are (cell, head, keys or values)."""
    cell = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    chunks = cell_field(cells, CHUNKS, cell, count).to(tl.int32)
    if chunks == 0:
        return
    layer = cell_field(cells, LAYER, cell, count)
    place = cell_field(cells, PLACE, cell, count)
    state = cell_field(cells, STATE, cell, count)
    KIND: tl.constexpr = x.dtype.element_ty
    if tl.program_id(2) == 0:
        column = keys_column
        offset = keys_offset + layer * keys_stride
    else:
        column = values_column
        offset = values_offset + layer * values_stride
    held = located(state, offset, KIND) + head * HELD * D
    own = x + cell * CELL * N + tl.multiple_of(column, 16) + head * D
    row = tl.arange(0, L)
    d = tl.arange(0, D)
    tile = row[:, None] * D + d[None, :]
    if SEGMENT:
        older = (place % HELD // L).to(tl.int32)
        ends = older + chunks == HELD // L
        if ends:
            for j in range(0, older):
                tl.store(held + j * L * D + tile, tl.zeros([L, D], KIND))
    else:
        older = HELD // L - chunks
        ends = older < 0
        # What stays moves towards the front: a row is read before any program of its own overwrites it.
        for j in range(0, tl.maximum(older, 0)):
            kept = tl.load(held + (j + chunks) * L * D + tile)
            tl.debug_barrier()
            tl.store(held + j * L * D + tile, kept)
            tl.debug_barrier()
    if not SEGMENT or not ends:
        for j in range(tl.maximum(-older, 0), chunks):
            at = (j * L + row)[:, None] * N + d[None, :]
            tl.store(held + (older + j) * L * D + tile, tl.load(own + at))


def keep(
    x: Tensor,
    keys_column: int,
    values_column: int,
    held: Held,
    rows: int,
    segment: bool,
    cells: Tensor,
    cell: int,
    length: int,
    head_dim: int,
    dim: int,
) -> None:
    """Put each cell's keys and values, columns of ``x`` `[cells cell, N]`, where its state holds them. A
    segment that ends drops its own: the state has zeros then. A window keeps the newest ``rows``."""
    keep_kernel[(cells.shape[1], dim // head_dim, 2)](
        x,
        cells,
        cells.shape[1],
        x.shape[1],
        keys_column,
        values_column,
        *held.keys,
        *held.values,
        D=head_dim,
        CELL=cell,
        L=length,
        HELD=rows,
        SEGMENT=segment,
        num_warps=4,
    )
