"""Attention of one token a session over persistent tokens, what its state holds and what its chunk has so
far, with the rotary positions of the token itself. Counterpart of ``attention`` where there is one query.

Keys go by parts, of a tile of one of these each. A program answers a share of a head's parts: one where there
are few sessions, all of them where there are many. The first is asked for before the launch's turn; the next
ones come while it is answered. What a part leaves is the same in every share, and the last program of a head
to end adds them up in the order of parts. So bits don't depend on shares. Knows no projection.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import located
from mnemosyne.kernels.triton.step_table import (
    INDEX,
    ON_DEVICE,
    OPEN,
    POSITION,
    STATE,
    begin,
    open_up,
    step_field,
)

TILE = 64
"""Rows of a part, of heads of up to 64 numbers."""
PROGRAMS = 528
"""That run at once, four a multiprocessor; where there would be more of them each has a larger share."""
REGISTERS = 112
"""A thread, so that they find room, and the launch before is there yet."""
CALLED = 2
"""Parts that are on their way to L2 besides the one on its way to registers."""


class Room(NamedTuple):
    """What the parts of a head leave to one another."""

    sums: Tensor
    """fp32 `[sessions, H, rooms, D + 2]`."""
    arrived: Tensor
    """int32 `[sessions, H]`, zeros before a launch and after it."""


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
def _rows(address, first, seen, KIND: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr):
    """Of one head, those ``seen`` of TILE from ``first`` on."""
    at = (first + tl.arange(0, TILE))[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(located(address, 0, KIND) + at, mask=seen[:, None], other=0.0)


@triton.jit
def _asked(part, end, held, chunk, model, of_keys, of_values, P: tl.constexpr, TILE: tl.constexpr):
    """Of a part of a head: where the keys and values are that it is of, its first row, the row behind its
    last, and which of TILE are seen, none of them from the part ``end`` on.

    The parts of persistent tokens (addresses ``model``) come first. After them those of tokens: what the
    state holds and what the chunk has; then those of what the memory answered. ``held``: address in the
    state, how many parts it has, those left out before them, its oldest row and the one behind its newest.
    ``chunk``: address, rows, and parts of state and chunk together. ``of_*``: offsets in both, for tokens,
    then for answers."""
    state, kept, passed, oldest, newest = held
    own, index, span = chunk
    FIXED: tl.constexpr = (P + TILE - 1) // TILE
    persistent = part < FIXED
    second = part >= FIXED + span
    place = part - FIXED - tl.where(second, span, 0)
    committed = place < kept
    first = tl.where(persistent, part, place + tl.where(committed, passed, -kept)) * TILE
    last = tl.where(persistent, P, tl.where(committed, newest, index))
    t = first + tl.arange(0, TILE)
    seen = (t < last) & ((t >= tl.where(committed, oldest, 0)) | persistent) & (part < end)
    base = tl.where(committed, state, own)
    keys = base + _one_of(committed, second, of_keys)
    values = base + _one_of(committed, second, of_values)
    return tl.where(persistent, model[0], keys), tl.where(persistent, model[1], values), first, last, seen


@triton.jit
def _one_of(committed, second, offsets):
    return tl.where(
        committed, tl.where(second, offsets[2], offsets[0]), tl.where(second, offsets[3], offsets[1])
    )


@triton.jit
def _call(
    part, held, chunk, model, of_keys, of_values, SIZE: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr
):
    """A part's rows, of SIZE bytes, into L2."""
    if ON_DEVICE:
        keys, values, first, last, _ = _asked(part, part + 1, held, chunk, model, of_keys, of_values, P, TILE)
        LINES: tl.constexpr = TILE * SIZE // 128
        i = tl.arange(0, 2 * LINES)
        line = tl.minimum(first * SIZE + i % LINES * 128, last * SIZE - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [tl.where(i < LINES, keys, values) + line],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _leave(room, y, total, best, D: tl.constexpr):
    """The sum of values, the sum of weights, the highest score."""
    tl.store(room + tl.arange(0, D), y)
    tl.store(room + D, total)
    tl.store(room + D + 1, best)


@triton.jit(do_not_specialize=["count", "share"])
def step_attention_kernel(
    x,
    h,
    persistent_k,
    persistent_v,
    cos,
    sin,
    out,
    room,
    arrived,
    table,
    count,
    share,
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
    ROOMS: tl.constexpr,
    CALLED: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Programs are (session, head, ``share`` of the parts that there are). The state holds HELD rows: those
    of the segment, from its first on, or the window's, the newest last. ``scale`` takes log2 e too.

    ``room`` has D + 2 numbers (``_leave``) for the token itself, for what the memory answered to it, and for
    each part. The last program of a head to have ``arrived`` adds them up."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    own = step_field(table, OPEN, row, count)
    state = step_field(table, STATE, row, count)
    index = step_field(table, INDEX, row, count).to(tl.int32)
    position = step_field(table, POSITION, row, count)
    open_up()
    if own == 0:
        return
    DIM: tl.constexpr = HEADS * D
    KIND: tl.constexpr = x.dtype.element_ty
    SIZE: tl.constexpr = D * (KIND.primitive_bitwidth // 8)
    SELF: tl.constexpr = 2 if SEGMENT else 1
    FIXED: tl.constexpr = (P + TILE - 1) // TILE

    # Which parts there are: of what the state holds, from the oldest row that is seen on.
    if SEGMENT:
        oldest = 0
        held = (position % HELD).to(tl.int32)
    else:
        # Rows within the window of the token, of those that the session has read at all.
        oldest = tl.maximum(index + 1, HELD - tl.minimum(position, HELD).to(tl.int32))
        held = HELD
    passed = oldest // TILE
    kept = tl.maximum((held + TILE - 1) // TILE - passed, 0)
    span = kept + (index + TILE - 1) // TILE
    parts = FIXED + SELF * span
    begun = tl.program_id(2) * share
    end = tl.minimum(begun + share, parts)
    if (begun > 0) & (begun >= parts):
        return

    of_held = (state + head * HELD * SIZE, kept, passed, oldest, held)
    of_chunk = (own + head * L * SIZE, index, span)
    of_model = (persistent_k.to(tl.int64) + head * P * SIZE, persistent_v.to(tl.int64) + head * P * SIZE)
    of_keys = (keys_state, keys_open, h_keys_state, h_keys_open)
    of_values = (values_state, values_open, h_values_state, h_values_open)
    keys, values, first, last, seen = _asked(
        begun, end, of_held, of_chunk, of_model, of_keys, of_values, P, TILE
    )
    k = _rows(keys, first, seen, KIND, TILE, D)
    v = _rows(values, first, seen, KIND, TILE, D)
    for part in tl.range(begun + 1, tl.minimum(begun + 1 + CALLED, end)):
        _call(part, of_held, of_chunk, of_model, of_keys, of_values, SIZE, P, TILE)

    begin()
    cos += row * (D // 2)
    sin += row * (D // 2)
    new = x + row * N + column + head * D
    q = _rotated(new, cos, sin, D, KIND) * scale
    room += (row * HEADS + head) * ROOMS * (D + 2)
    if begun == 0:
        # The token itself: kept in the chunk, and seen.
        d = tl.arange(0, D)
        to = (head * L + index) * D + d
        k_new = _rotated(new + DIM, cos, sin, D, KIND)
        v_new = tl.load(new + 2 * DIM + d)
        tl.store(located(own, keys_open, KIND) + to, k_new)
        tl.store(located(own, values_open, KIND) + to, v_new)
        _leave(room, v_new.to(tl.float32), 1.0, tl.sum(q * k_new, 0), D)
        if SEGMENT:
            new = h + row * (2 * DIM) + head * D
            k_new = _rotated(new, cos, sin, D, KIND)
            v_new = tl.load(new + DIM + d)
            tl.store(located(own, h_keys_open, KIND) + to, k_new)
            tl.store(located(own, h_values_open, KIND) + to, v_new)
            _leave(room + D + 2, v_new.to(tl.float32), 1.0, tl.sum(q * k_new, 0), D)

    # One body whatever the share, which the compiler doesn't know. The next part is asked for as soon as
    # registers get free.
    for part in tl.range(begun, end, num_stages=1):
        if part + 1 + CALLED < end:
            _call(part + 1 + CALLED, of_held, of_chunk, of_model, of_keys, of_values, SIZE, P, TILE)
        score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), -1e30)
        best = tl.max(score, 0)
        weight = tl.where(seen, tl.exp2(score - best), 0.0)
        keys, values, first, last, seen = _asked(
            part + 1, end, of_held, of_chunk, of_model, of_keys, of_values, P, TILE
        )
        k = _rows(keys, first, seen, KIND, TILE, D)
        y = tl.sum(v.to(tl.float32) * weight[:, None], 0)
        v = _rows(values, first, seen, KIND, TILE, D)
        _leave(room + (SELF + part) * (D + 2), y, tl.sum(weight, 0), best, D)

    # Together with the other shares.
    shares = tl.maximum((parts + share - 1) // share, 1)
    tl.debug_barrier()  # all of it is stored
    if tl.atomic_add(arrived + row * HEADS + head, 1, sem="acq_rel") == shares - 1:
        tl.debug_barrier()
        d = tl.arange(0, D)
        p = tl.arange(0, ROOMS)
        there = p < SELF + parts
        rooms = room + p * (D + 2)
        tops = tl.load(rooms + D + 1, mask=there, other=-1e30, cache_modifier=".cg")
        totals = tl.load(rooms + D, mask=there, other=0.0, cache_modifier=".cg")
        sums = tl.load(rooms[:, None] + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
        shrink = tl.exp2(tops - tl.max(tops, 0))
        whole = tl.sum(sums * shrink[:, None], 0) / tl.sum(totals * shrink, 0)
        tl.store(out + row * DIM + head * D + d, whole)
        tl.store(arrived + row * HEADS + head, 0)


def _tile(head_dim: int) -> int:
    return TILE * 64 // max(head_dim, 64)


def _parts(persistent: int, held: int, chunk: int, head_dim: int, answered: bool) -> int:
    """Most that a head has; ``answered``: a memory has keys and values too."""
    fixed, kept, own = (triton.cdiv(rows, _tile(head_dim)) for rows in (persistent, held, chunk))
    return fixed + (1 + answered) * (kept + own)


def rooms_of(persistent: int, held: int, chunk: int, head_dim: int, answered: bool) -> int:
    """Of a head; of shapes alone."""
    return triton.next_power_of_2(1 + answered + _parts(persistent, held, chunk, head_dim, answered))


def step_attend(
    x: Tensor,
    column: int,
    h: Tensor | None,
    persistent_k: Tensor,
    persistent_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    room: Room,
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
    sessions = table.shape[1]
    parts = _parts(persistent, rows, chunk, head_dim, held_h is not None)
    share = min(triton.cdiv(sessions * heads * parts, PROGRAMS), parts)
    step_attention_kernel[(sessions, heads, triton.cdiv(parts, share))](
        x,
        x if h is None else h,
        persistent_k,
        persistent_v,
        cos,
        sin,
        out,
        *room,
        table,
        sessions,
        share,
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
        TILE=_tile(head_dim),
        ROOMS=room.sums.shape[2],
        CALLED=CALLED,
        SEGMENT=held_h is not None,
        num_warps=4,
        maxnreg=REGISTERS,
        launch_pdl=True,
    )
