"""``learn`` with the memory on the chip from a cell's first chunk to its last: M in registers, S in shared
memory; what lies in the state is read once and written once a cell, and no room is needed.

Beside ``learn`` because the chip holds the memory of one shape alone, and no cache of an open chunk besides
(``serves``). ``learn`` chooses by shapes, device and whether the memory moves, never by load: a chunk is
committed by this kernel in a wave of single chunks as in one of whole cells, and an open chunk is always
filled by that one. The two add up in different orders; no bit of one is promised to be the other's.

Hidden units are the rows of every wide product, half of them at a time. M1 and M2^T are sums in registers
and, in the operands' precision, left operands from there. S1, S2^T and a copy of M2^T for the sums over
hidden units lie in shared memory, as do a chunk's x^T, slopes or inner gradients, and y^T. Written in Gluon,
Triton's language with layouts: what of a product a thread has decides where everything lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.kernels.triton.cell_gates import THETA, VECTORS, A, CellDecays, E, F, S, W
from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, PLACE, STATE, cell_field, located
from mnemosyne.kernels.triton.learn_steps import (
    COLUMN,
    FLAT,
    HALF,
    KIND,
    OPERAND,
    ROW,
    ROWS,
    SUM_COLUMN,
    SUM_ROW,
    SUMS,
    UNIT,
    UNIT_COLUMN,
    UNITS,
    WIDE,
    D,
    H,
    L,
    again,
    barrier,
    by_token,
    half,
    in_rows,
    make_gradients,
    make_inputs,
    make_reads,
    move,
    ready,
    room,
    tile,
)
from mnemosyne.kernels.triton.network import clip_factor, finish, length, output_delta
from mnemosyne.kernels.triton.recall import head_norm

VERSIONS = ("3.6.", "3.7.")
"""Of triton that have Gluon as it is used here: it still changes from one to the next."""
WARPS = 8
SHARED = 227 * 1024
"""Bytes of shared memory; a program takes nearly as many."""


@gluon.jit(do_not_specialize=["count"])
def resident_kernel(
    streams,
    gates,
    vectors,
    decay,
    norm,
    out,
    trace,
    norms,
    cells,
    count,
    gates_width,
    gates_column,
    clip,
    epsilon,
    hidden_m_offset,
    hidden_m_stride,
    hidden_s_offset,
    hidden_s_stride,
    last_m_offset,
    last_m_stride,
    last_s_offset,
    last_s_stride,
    K_COLUMN: gl.constexpr,
    Q_COLUMN: gl.constexpr,
    V_COLUMN: gl.constexpr,
    HEADS: gl.constexpr,
    CELL: gl.constexpr,
    VECTORS: gl.constexpr,
    EVERY: gl.constexpr,
    RESIDUAL: gl.constexpr,
    NORM: gl.constexpr,
    CLIP: gl.constexpr,
):
    """Programs are (head, cell). ``hidden`` is the first of two memory layers, ``last`` the second.

    Rooms in shared memory are taken anew for each phase, at a place that is 0 but looks as if it depended on
    the chunk: else the compiler computes every address of every phase before the first chunk, and has no
    registers to keep them in."""
    cell = gl.program_id(1).to(gl.int64)
    chunks = cell_field(cells, CHUNKS, cell, count).to(gl.int32)
    if chunks == 0:
        return
    head = gl.program_id(0)
    SIZE: gl.constexpr = D * H
    DIM: gl.constexpr = HEADS * D
    layer = cell_field(cells, LAYER, cell, count)
    state = cell_field(cells, STATE, cell, count)
    first = (cell_field(cells, PLACE, cell, count) // L).to(gl.int32)
    hidden_m = located(state, hidden_m_offset + layer * hidden_m_stride, gl.float32) + head * SIZE
    hidden_s = located(state, hidden_s_offset + layer * hidden_s_stride, KIND) + head * SIZE
    last_m = located(state, last_m_offset + layer * last_m_stride, gl.float32) + head * SIZE
    last_s = located(state, last_s_offset + layer * last_s_stride, KIND) + head * SIZE

    # The state comes on the chip.
    s1_room = room(H)
    s2_room = room(H)
    w2_room = room(H)
    unit = gl.arange(0, HALF, UNIT)
    column = gl.arange(0, D, UNIT_COLUMN)
    at_hidden = unit[:, None] * D + column[None, :]
    at_last = column[None, :] * H + unit[:, None]
    m1a = gl.load(hidden_m + at_hidden)
    m1b = gl.load(hidden_m + HALF * D + at_hidden)
    m2a = gl.load(last_m + at_last)
    m2b = gl.load(last_m + HALF + at_last)
    hf = gl.arange(0, H, gl.SliceLayout(1, FLAT))
    df = gl.arange(0, D, gl.SliceLayout(0, FLAT))
    dw = gl.arange(0, D, gl.SliceLayout(1, WIDE))
    hw = gl.arange(0, H, gl.SliceLayout(0, WIDE))
    s1_room.index(0).store(gl.load(hidden_s + hf[:, None] * D + df[None, :]))
    turned = gl.allocate_shared_memory(KIND, [D, H], OPERAND, gl.load(last_s + dw[:, None] * H + hw[None, :]))
    barrier()
    s2_room.index(0).store(turned.permute((1, 0)).load(UNITS))
    w2 = w2_room.index(0)
    half(w2, 0).store(m2a.to(KIND))
    half(w2, 1).store(m2b.to(KIND))

    t = gl.arange(0, L, ROW)
    d = gl.arange(0, D, COLUMN)
    ts = gl.arange(0, L, SUM_ROW)
    square_at = ts[:, None] * L + gl.arange(0, L, SUM_COLUMN)[None, :]

    for c in range(chunks):
        barrier()
        made_room = room(H)
        slopes_room = room(H)
        nought = c >> 20
        made = made_room.index(nought)
        slopes = slopes_room.index(nought)
        at = streams + (cell * CELL + c * L) * 3 * DIM + head * D + t[:, None] * 3 * DIM + d[None, :]
        place = (cell * (CELL // L) + c) * HEADS + head
        of_hidden = vectors + place * 2 * VECTORS * L
        of_last = of_hidden + VECTORS * L

        # The last product, and what of the hidden units the phases after it need.
        k_tile = tile(gl.load(at + K_COLUMN), nought)
        q_tile = room(L).index(nought)
        v_tile = room(L).index(nought)
        async_copy.async_copy_global_to_shared(q_tile, at + Q_COLUMN)
        async_copy.async_copy_global_to_shared(v_tile, at + V_COLUMN)
        async_copy.commit_group()
        ready()
        square = make_inputs(m1a, k_tile.permute((1, 0)), half(made, 0), half(slopes, 0))
        square += make_inputs(m1b, k_tile.permute((1, 0)), half(made, 1), half(slopes, 1))
        ready()
        nought = c >> 21
        zero = gl.zeros([L, D], gl.float32, SUMS)
        made = made_room.index(nought)
        z = warpgroup_mma(made.permute((1, 0)), w2_room.index(nought), zero, is_async=True)
        x_square = by_token(square, nought)
        async_copy.wait_group(0)
        k32 = k_tile.load(ROWS).to(gl.float32)
        k_norm = length(k32)
        z = in_rows(warpgroup_mma_wait(0, deps=[z]), nought)
        v = v_tile.load(ROWS).to(gl.float32)
        delta, rstd = output_delta(z, k32, v, k_norm, D, RESIDUAL, NORM, False)
        last_norm = length(delta) * gl.sqrt(x_square)

        # The inner gradient of the hidden layer, whose norm must be known before any of it is stored.
        nought = c >> 22
        slopes = slopes_room.index(nought)
        w2 = w2_room.index(nought)
        delta_tile = tile(delta, nought)
        ready()
        wide = gl.full([HALF, L], 0.0, gl.float32, UNITS)
        back = warpgroup_mma(half(w2, 0), delta_tile.permute((1, 0)), wide, is_async=True)
        scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, is_async=True)
        weight = gl.load(decay + place * 2 * L * L + square_at).to(gl.float32)
        back = warpgroup_mma_wait(1, deps=[back])
        square = make_gradients(back, half(slopes, 0))
        back = warpgroup_mma(half(w2, 1), delta_tile.permute((1, 0)), wide, is_async=True)
        back, scores = warpgroup_mma_wait(0, deps=[back, scores])
        square += make_gradients(back, half(slopes, 1))
        hidden_norm = gl.sqrt(by_token(square, nought)) * k_norm
        hidden_factor = gl.full([L], 1.0, gl.float32, ROW)
        if CLIP:
            hidden_factor = clip_factor(hidden_norm, clip)
            delta *= clip_factor(last_norm, clip)[:, None]

        # The read of every token.
        own = scores * weight * gl.convert_layout(-hidden_factor, SUM_COLUMN)[None, :]
        barrier()
        nought = c >> 23
        slopes = slopes_room.index(nought)
        s1 = s1_room.index(nought)
        own_tile = tile(own, nought).permute((1, 0))
        q = q_tile.load(ROWS).to(gl.float32)
        qa = tile(gl.load(of_hidden + A * L + t)[:, None] * q, nought).permute((1, 0))
        qf = tile(gl.load(of_hidden + F * L + t)[:, None] * q, nought).permute((1, 0))
        read_room = room(H)
        read = read_room.index(nought)
        ready()
        make_reads(m1a, half(s1, 0), half(slopes, 0), qa, qf, own_tile, half(read, 0))
        make_reads(m1b, half(s1, 1), half(slopes, 1), qa, qf, own_tile, half(read, 1))
        nought = c >> 24
        barrier()
        made = made_room.index(nought)
        read = read_room.index(nought)
        w = gl.load(of_last + W * L + t)
        delta_tile = tile(delta, nought)
        delta_m = tile(-w[:, None] * delta, nought)
        delta_s = tile(-gl.load(of_last + S * L + t)[:, None] * delta, nought)
        ready()
        scores = warpgroup_mma(read.permute((1, 0)), made, zero, is_async=True)
        kept = warpgroup_mma(read.permute((1, 0)), w2_room.index(nought), zero, is_async=True)
        past = warpgroup_mma(read.permute((1, 0)), s2_room.index(nought), zero, is_async=True)
        weight = gl.load(decay + (place * 2 + 1) * L * L + square_at).to(gl.float32)
        a = gl.load(of_last + A * L + ts)
        f = gl.load(of_last + F * L + ts)
        scores = warpgroup_mma_wait(2, deps=[scores])
        seen = -scores * weight
        kept, past = warpgroup_mma_wait(0, deps=[kept, past])
        z = a[:, None] * kept + f[:, None] * past
        barrier()
        seen_tile = tile(seen, nought)
        ready()
        z = warpgroup_mma(seen_tile, delta_tile, z, is_async=True)

        # What comes next is on its way meanwhile. q and k have lost their places.
        q = gl.load(at + Q_COLUMN).to(gl.float32)
        k = gl.load(at + K_COLUMN).to(gl.float32)
        row = (cell * CELL + c * L + t)[:, None]
        opened = gl.load(gates + row * gates_width + gates_column + head * D + d[None, :]).to(gl.float32)
        own_norm = gl.load(norm + layer * D + d + (c >> 27))
        w_hidden = gl.load(of_hidden + W * L + t) * hidden_factor
        s_hidden = gl.load(of_hidden + S * L + t) * hidden_factor
        a_end = gl.load(of_last + A * L + L - 1)
        f_end = gl.load(of_last + F * L + L - 1)
        e_end = gl.load(of_last + E * L + L - 1)
        ha_end = gl.load(of_hidden + A * L + L - 1)
        hf_end = gl.load(of_hidden + F * L + L - 1)
        he_end = gl.load(of_hidden + E * L + L - 1)

        z = in_rows(warpgroup_mma_wait(0, deps=[z]), nought)
        y = head_norm(finish(z, q, D, RESIDUAL, NORM), own_norm, D, epsilon)
        to = out + (cell * CELL + c * L) * DIM + head * D + t[:, None] * DIM + d[None, :]
        gl.store(to, (y / (1.0 + gl.exp(-opened))).to(KIND))

        # The store.
        barrier()
        nought = c >> 25
        made = made_room.index(nought)
        slopes = slopes_room.index(nought)
        s1 = s1_room.index(nought)
        s2 = s2_room.index(nought)
        w2 = w2_room.index(nought)
        k_m = tile(-w_hidden[:, None] * k, nought)
        k_s = tile(-s_hidden[:, None] * k, nought)
        ready()
        m1a, hidden_step, hidden_before = move(
            m1a, half(s1, 0), half(slopes, 0), k_m, k_s, ha_end, hf_end, he_end
        )
        m1b, one, two = move(m1b, half(s1, 1), half(slopes, 1), k_m, k_s, ha_end, hf_end, he_end)
        hidden_step += one
        hidden_before += two
        m2a, step, before = move(m2a, half(s2, 0), half(made, 0), delta_m, delta_s, a_end, f_end, e_end)
        half(w2, 0).store(m2a.to(KIND))
        m2b, one, two = move(m2b, half(s2, 1), half(made, 1), delta_m, delta_s, a_end, f_end, e_end)
        half(w2, 1).store(m2b.to(KIND))
        step += one
        before += two

        # What the chunk did, for the trace.
        theta = gl.load(of_last + THETA * L + t)
        whole = last_norm * last_norm
        momentary = whole * theta * theta
        theta = gl.load(of_hidden + THETA * L + t)
        square = hidden_norm * hidden_norm
        whole += square
        momentary += square * theta * theta
        gl.store(norms + place * 2 * L + t, hidden_norm)
        gl.store(norms + (place * 2 + 1) * L + t, last_norm)
        told = trace + place * 7
        moved = gl.sum(gl.join(gl.join(hidden_step, hidden_before), gl.join(step, before)), 0)
        which: gl.constexpr = gl.SliceLayout(1, moved.type.layout)
        whose: gl.constexpr = gl.SliceLayout(0, moved.type.layout)
        gl.store(told + 3 + gl.arange(0, 2, which)[:, None] + 2 * gl.arange(0, 2, whose)[None, :], moved)
        surprise = gl.sum(gl.join(gl.sqrt(whole), gl.sqrt(momentary)), 0)
        gl.store(told + gl.arange(0, 2, surprise.type.layout), surprise)
        gain = float("nan")
        if (first + c) % EVERY == EVERY - 1:
            made = made_room.index(c >> 26)
            gram = warpgroup_mma(made.permute((1, 0)), made, zero)
            curvature = 2.0 * w
            if NORM:
                curvature *= rstd * rstd
            if CLIP:
                curvature *= clip_factor(last_norm, clip)
            both = gram * gram * gl.convert_layout(curvature, SUM_ROW)[:, None]
            both *= gl.convert_layout(curvature, SUM_COLUMN)[None, :]
            lead = gl.sum(curvature * x_square, 0)
            gain = gl.sum(gl.sum(both, 1), 0) / gl.maximum(lead, 1e-30) / (1.0 + a_end)
        gl.store(told + 2, gain)

    # The state goes back. Bits of an index that its thread decides are as the layouts say.
    barrier()
    unit = again(unit, 0b1110111)
    column = again(column, 0b110)
    at_hidden = unit[:, None] * D + column[None, :]
    at_last = column[None, :] * H + unit[:, None]
    gl.store(hidden_m + at_hidden, m1a)
    gl.store(hidden_m + HALF * D + at_hidden, m1b)
    gl.store(last_m + at_last, m2a)
    gl.store(last_m + HALF + at_last, m2b)
    nought = chunks >> 20
    at_flat = again(hf, 0b11111)[:, None] * D + again(df, 0b111000)[None, :]
    gl.store(hidden_s + at_flat, s1_room.index(nought).load(FLAT))
    turned = gl.allocate_shared_memory(KIND, [D, H], OPERAND)
    turned.permute((1, 0)).store(s2_room.index(nought).load(UNITS))
    barrier()
    at_wide = again(dw, 0b111)[:, None] * H + again(hw, 0b11111000)[None, :]
    gl.store(last_s + at_wide, turned.load(WIDE))


@cache
def _has_room(device: torch.device) -> bool:
    if device.type != "cuda" or not triton.__version__.startswith(VERSIONS):
        return False
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor) == (9, 0) and found.shared_memory_per_block_optin >= SHARED


def serves(streams: Tensor, decays: CellDecays, head_dim: int, width: int) -> bool:
    """Whether this kernel has the shapes that ``learn`` was given, and the device room for it."""
    *_, depth, length, _ = decays.G.shape
    shape = depth, head_dim, length, width
    fits = shape == (2, D.value, L.value, H.value) and streams.dtype == torch.bfloat16
    return fits and _has_room(streams.device)


def learn(
    streams: Tensor,
    columns: tuple[int, int, int],
    gates: Tensor,
    gates_column: int,
    decays: CellDecays,
    norm: Tensor,
    out: Tensor,
    trace: Tensor,
    norms: Tensor,
    of_state: Sequence[int],
    architecture: Architecture,
    clip: float | None,
    epsilon: float,
    every: int,
    cells: Tensor,
    cell: int,
) -> None:
    """Arguments as of ``learn.learn``; ``of_state``: offset and layer stride in a state of M1, S1, M2, S2."""
    heads = decays.G.shape[2]
    resident_kernel[(heads, cells.shape[1])](
        streams,
        gates,
        decays.vectors,
        decays.G,
        norm,
        out,
        trace,
        norms,
        cells,
        cells.shape[1],
        gates.shape[1],
        gates_column,
        clip or 0.0,
        epsilon,
        *of_state,
        K_COLUMN=columns[0],
        Q_COLUMN=columns[1],
        V_COLUMN=columns[2],
        HEADS=heads,
        CELL=cell,
        VECTORS=VECTORS,
        EVERY=every,
        RESIDUAL=architecture.residual,
        NORM=architecture.norm,
        CLIP=clip is not None,
        num_warps=WARPS,
    )
