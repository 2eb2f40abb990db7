"""Attention of one token a session over persistent tokens, what its state holds and what its chunk has so
far, with the rotary positions of the token itself. Counterpart of ``attention`` where there is one query.

A program answers one head. Every row of a tile has a softmax of its own until the end, so that nothing passes
between threads on the way. Knows no projection.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import located
from mnemosyne.kernels.triton.step_table import INDEX, OPEN, POSITION, STATE, begin, step_field


class HeldRows(NamedTuple):
    """Byte offsets of one layer's keys and values `[H, rows, D]`: in the state, and in the open chunk."""

    keys: tuple[int, int]
    values: tuple[int, int]


@triton.jit
def _rotated(x, cos, sin, D: tl.constexpr, KIND: tl.constexpr):
    """``x`` points to one head; fp32 `[D]`, rounded as it is kept."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, D)
    other = tl.load(x + (d + HALF) % D).to(tl.float32)
    other = tl.where(d < HALF, -other, other)
    turned = tl.load(x + d).to(tl.float32) * tl.load(cos + d % HALF) + other * tl.load(sin + d % HALF)
    return turned.to(KIND).to(tl.float32)


@triton.jit
def _take(q, keys, values, at, seen, top, total, acc):
    """Online softmax over one more tile, row by row; ``q`` has the scale and log2 e in it."""
    k = tl.load(keys + at, mask=seen[:, None], other=0.0).to(tl.float32)
    v = tl.load(values + at, mask=seen[:, None], other=0.0).to(tl.float32)
    score = tl.where(seen, tl.sum(k * q[None, :], 1), -1e30)
    highest = tl.maximum(top, score)
    weight = tl.where(seen, tl.exp2(score - highest), 0.0)
    shrink = tl.exp2(top - highest)
    return highest, total * shrink + weight, acc * shrink[:, None] + v * weight[:, None]


@triton.jit(do_not_specialize=["count"])
def step_attention_kernel(
    x,
    h,
    persistent_k,
    persistent_v,
    cos,
    sin,
    out,
    table,
    count,
    N,
    column,
    keys_state,
    keys_open,
    values_state,
    values_open,
    h_keys_state,
    h_keys_open,
    h_values_state,
    h_values_open,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    HELD: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Programs are (session, head). The state holds HELD rows: those of the segment, from its first on, or
    the window's, the newest last. ``scale`` takes log2 e too."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    own = step_field(table, OPEN, row, count)
    state = step_field(table, STATE, row, count)
    index = step_field(table, INDEX, row, count).to(tl.int32)
    position = step_field(table, POSITION, row, count)
    begin()
    if own == 0:
        return
    DIM: tl.constexpr = HEADS * D
    KIND: tl.constexpr = x.dtype.element_ty
    d = tl.arange(0, D)
    t = tl.arange(0, TILE)
    at = t[:, None] * D + d[None, :]
    cos += row * (D // 2)
    sin += row * (D // 2)
    new = x + row * N + column + head * D
    q = _rotated(new, cos, sin, D, KIND) * scale
    k = _rotated(new + DIM, cos, sin, D, KIND)
    v = tl.load(new + 2 * DIM + d)
    own_k = located(own, keys_open, KIND) + head * L * D
    own_v = located(own, values_open, KIND) + head * L * D
    tl.store(own_k + index * D + d, k)
    tl.store(own_v + index * D + d, v)
    # The token sees itself: its rows come from where they were made, and not from where they are kept.
    score = tl.sum(q * k, 0)
    best = score
    if SEGMENT:
        h_new = h + row * (2 * DIM) + head * D
        h_k = _rotated(h_new, cos, sin, D, KIND)
        h_v = tl.load(h_new + DIM + d)
        h_own_k = located(own, h_keys_open, KIND) + head * L * D
        h_own_v = located(own, h_values_open, KIND) + head * L * D
        tl.store(h_own_k + index * D + d, h_k)
        tl.store(h_own_v + index * D + d, h_v)
        h_score = tl.sum(q * h_k, 0)
        best = tl.maximum(score, h_score)

    top = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, D], tl.float32)
    for j in tl.range(0, P, TILE, num_stages=STAGES):
        first = (head * P + j) * D
        seen = j + t < P
        top, total, acc = _take(q, persistent_k + first, persistent_v + first, at, seen, top, total, acc)

    if SEGMENT:
        oldest = 0
        held = (position % HELD).to(tl.int32)
    else:
        # Rows within the window of the token, of those that the session has read at all.
        oldest = tl.maximum(index + 1, HELD - tl.minimum(position, HELD).to(tl.int32))
        held = HELD
    held_k = located(state, keys_state, KIND) + head * HELD * D
    held_v = located(state, values_state, KIND) + head * HELD * D
    if SEGMENT:
        h_held_k = located(state, h_keys_state, KIND) + head * HELD * D
        h_held_v = located(state, h_values_state, KIND) + head * HELD * D
    for j in tl.range(oldest // TILE * TILE, held, TILE, num_stages=STAGES):
        seen = (j + t >= oldest) & (j + t < held)
        if SEGMENT:
            top, total, acc = _take(q, h_held_k + j * D, h_held_v + j * D, at, seen, top, total, acc)
        top, total, acc = _take(q, held_k + j * D, held_v + j * D, at, seen, top, total, acc)
    for j in tl.range(0, index, TILE, num_stages=STAGES):
        seen = j + t < index
        if SEGMENT:
            top, total, acc = _take(q, h_own_k + j * D, h_own_v + j * D, at, seen, top, total, acc)
        top, total, acc = _take(q, own_k + j * D, own_v + j * D, at, seen, top, total, acc)

    best = tl.maximum(best, tl.max(top, 0))
    shrink = tl.exp2(top - best)
    weight = tl.exp2(score - best)
    whole = tl.sum(total * shrink, 0) + weight
    y = tl.sum(acc * shrink[:, None], 0) + weight * v.to(tl.float32)
    if SEGMENT:
        weight = tl.exp2(h_score - best)
        whole += weight
        y += weight * h_v.to(tl.float32)
    tl.store(out + row * DIM + head * D + d, y / whole)


def step_attend(
    x: Tensor,
    column: int,
    h: Tensor | None,
    persistent_k: Tensor,
    persistent_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    held: HeldRows,
    held_h: HeldRows | None,
    rows: int,
    chunk: int,
    table: Tensor,
) -> None:
    """Attention's output before its projection, `[sessions, dim]`; the token's rows go into the open chunk.

    ``x`` `[sessions, N]` has q, k, v from ``column`` on, ``h`` `[sessions, 2 dim]` k and v of what the memory
    answered (MAC: ``held_h`` then says where their rows are); none is rotated. ``cos``, ``sin`` `[sessions,
    D / 2]` fp32; ``persistent_*`` `[H, P, D]`; ``rows`` that a state holds: the segment or the window.
    """
    heads, persistent, head_dim = persistent_k.shape
    second = held if held_h is None else held_h
    step_attention_kernel[(table.shape[1], heads)](
        x,
        x if h is None else h,
        persistent_k,
        persistent_v,
        cos,
        sin,
        out,
        table,
        table.shape[1],
        x.shape[1],
        column,
        *held.keys,
        *held.values,
        *second.keys,
        *second.values,
        head_dim**-0.5 * 1.4426950408889634,
        HEADS=heads,
        D=head_dim,
        P=persistent,
        L=chunk,
        HELD=rows,
        TILE=min(2048 // head_dim, 64),
        STAGES=4,
        SEGMENT=held_h is not None,
        num_warps=4,
        launch_pdl=True,
    )
