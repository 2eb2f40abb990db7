"""A cell's memory: its chunks are stored one after the other, and every token reads what stands after its
own.

Scan and read of ``kernels.chunk`` in one program a head, for the Titans rule. Cells of many layers or
sessions run at once, so nothing is gained by a read of its own, and what a scan would have to leave for it,
the memory at every chunk's start, is never written. The memory is changed where the session's state has it:
a chunk takes it through the chip in blocks of hidden units, four times: the last product; the slopes; the
read; the store. What is an operand only, three of the four times, comes from a copy in the operands'
precision, half as many bytes. Sums and the memory are fp32, momentum has the operands' precision. One
program, one order of sums.

Where the chip holds all of a memory, what moves it is ``learn_resident``'s kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.kernels.triton.cell_gates import THETA, VECTORS, A, CellDecays, E, F, S, W
from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, OPEN, PLACE, STATE, cell_field, located
from mnemosyne.kernels.triton.network import clip_factor, finish, gelu, length, output_delta
from mnemosyne.kernels.triton.recall import head_norm
from mnemosyne.kernels.triton.scan import _clipped, _settle, _stores
from mnemosyne.kernels.triton.support import PRECISIONS

try:
    from mnemosyne.kernels.triton import learn_resident as resident
except (ImportError, AttributeError):  # a triton without the Gluon that it is written in
    resident = None


class Where(NamedTuple):
    """Byte offsets and layer strides in a state, one pair a memory layer."""

    memory: Sequence[tuple[int, int]]
    momentum: Sequence[tuple[int, int]]


class Cached(NamedTuple):
    """The same in an open chunk, of what later tokens read: inputs and deltas of each memory layer."""

    inputs: Sequence[tuple[int, int]]
    deltas: Sequence[tuple[int, int]]


@triton.jit
def _vector(vectors, which: tl.constexpr, t, L: tl.constexpr):
    return tl.load(vectors + which * L + t)


@triton.jit
def _last(vectors, which: tl.constexpr, L: tl.constexpr):
    return tl.load(vectors + which * L + L - 1)


@triton.jit
def _weighted(weight, x, kind: tl.constexpr):
    """Rows of ``x``, each times its weight, as an operand."""
    return (weight[:, None] * x.to(tl.float32)).to(kind)


@triton.jit
def _move(m, s, m_left, m_right, s_left, s_right, A, F, E, PRECISION: tl.constexpr):
    """M' = A M + F S + m_left m_right and S' = E S + s_left s_right of a part of a matrix, where it lies; M',
    and the squares of M' - M and of M, summed over rows."""
    old = tl.load(m)
    past = tl.load(s).to(tl.float32)
    new = _settle(tl.dot(m_left, m_right, A * old + F * past, input_precision=PRECISION))
    tl.store(m, new)
    tl.store(s, _settle(tl.dot(s_left, s_right, E * past, input_precision=PRECISION)))
    step = new - old
    return new, tl.sum(step * step, 1), tl.sum(old * old, 1)


@triton.jit(do_not_specialize=["count"])
def learn_kernel(
    streams,
    gates,
    vectors,
    decay,
    work,
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
    keys_offset,
    keys_stride,
    inputs_offset,
    inputs_stride,
    back_offset,
    back_stride,
    deltas_offset,
    deltas_stride,
    K_COLUMN: tl.constexpr,
    Q_COLUMN: tl.constexpr,
    V_COLUMN: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
    EVERY: tl.constexpr,
    DEEP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    STORE: tl.constexpr,
    CACHE: tl.constexpr,
    ROUGH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs are (head, cell). ``hidden`` is the first of two memory layers (DEEP), ``last`` the only or
    the second one. STORE: the memory moves; CACHE: what later tokens of an open chunk read is kept there."""
    cell = tl.program_id(1).to(tl.int64)
    chunks = cell_field(cells, CHUNKS, cell, count).to(tl.int32)
    if chunks == 0:
        return
    head = tl.program_id(0)
    SIZE: tl.constexpr = D * H
    DIM: tl.constexpr = HEADS * D
    LAYERS: tl.constexpr = 2 if DEEP else 1
    KIND: tl.constexpr = streams.dtype.element_ty
    layer = cell_field(cells, LAYER, cell, count)
    state = cell_field(cells, STATE, cell, count)
    first = (cell_field(cells, PLACE, cell, count) // L).to(tl.int32)
    last_m = located(state, last_m_offset + layer * last_m_stride, tl.float32) + head * SIZE
    last_s = located(state, last_s_offset + layer * last_s_stride, KIND) + head * SIZE
    if DEEP:
        hidden_m = located(state, hidden_m_offset + layer * hidden_m_stride, tl.float32) + head * SIZE
        hidden_s = located(state, hidden_s_offset + layer * hidden_s_stride, KIND) + head * SIZE
        made = work + (cell * HEADS + head) * 2 * (L * H + SIZE)
        slopes = made + L * H
        hidden_w = slopes + L * H
        last_w = hidden_w + SIZE
        for b in range(0, SIZE, SIZE // 8):
            i = b + tl.arange(0, SIZE // 8)
            tl.store(hidden_w + i, tl.load(hidden_m + i))
            tl.store(last_w + i, tl.load(last_m + i))
    t = tl.arange(0, L)
    d = tl.arange(0, D)
    tile = t[:, None] * DIM + d[None, :]
    own_norm = tl.load(norm + layer * D + d)

    for c in range(chunks):
        # What other threads of this program wrote, of the memory, is read from here on.
        tl.debug_barrier()
        at = streams + (cell * CELL + c * L) * 3 * DIM + head * D + t[:, None] * 3 * DIM + d[None, :]
        k = tl.load(at + K_COLUMN)
        q = tl.load(at + Q_COLUMN)
        v = tl.load(at + V_COLUMN).to(tl.float32)
        place = (cell * (CELL // L) + c) * HEADS + head
        of_last = vectors + (place * LAYERS + LAYERS - 1) * VECTORS * L
        of_hidden = vectors + place * LAYERS * VECTORS * L
        square_at = t[:, None] * L + t[None, :]
        k32 = k.to(tl.float32)
        k_norm = length(k32)
        measured = (first + c) % EVERY == EVERY - 1

        # The last product, and what of the hidden units the passes after it need.
        if DEEP:
            z = tl.zeros([L, D], tl.float32)
            square = tl.zeros([L], tl.float32)
            for b in range(0, H, BLOCK):
                hb = b + tl.arange(0, BLOCK)
                w1 = tl.load(hidden_w + hb[:, None] * D + d[None, :])
                w2 = tl.load(last_w + d[:, None] * H + hb[None, :])
                x, slope = gelu(tl.dot(k, tl.trans(w1), input_precision=PRECISION), ROUGH)
                xt = x.to(KIND)
                tl.store(made + t[:, None] * H + hb[None, :], xt)
                tl.store(slopes + t[:, None] * H + hb[None, :], slope)
                z = tl.dot(xt, tl.trans(w2), z, input_precision=PRECISION)
                square += tl.sum(x * x, 1)
            x_norm = tl.sqrt(square)
        else:
            w2 = tl.load(last_m + d[:, None] * D + d[None, :]).to(KIND)
            z = tl.dot(k, tl.trans(w2), input_precision=PRECISION)
            x_norm = k_norm
        delta, rstd = output_delta(z, k32, v, k_norm, D, RESIDUAL, NORM, False)
        last_norm = length(delta) * x_norm

        # The inner gradient of the hidden layer, whose norm must be known before any of it is stored.
        if DEEP:
            tl.debug_barrier()
            square = tl.zeros([L], tl.float32)
            dt = delta.to(KIND)
            for b in range(0, H, BLOCK):
                hb = b + tl.arange(0, BLOCK)
                w2 = tl.load(last_w + d[:, None] * H + hb[None, :])
                slope = tl.load(slopes + t[:, None] * H + hb[None, :]).to(tl.float32)
                back = tl.dot(dt, w2, input_precision=PRECISION) * slope
                tl.store(slopes + t[:, None] * H + hb[None, :], back)
                square += tl.sum(back * back, 1)
            hidden_norm = tl.sqrt(square) * k_norm
            tl.debug_barrier()
        scaled = _clipped(delta, last_norm, clip, CLIP)

        # The read of every token.
        a = _vector(of_last, A, t, L)
        f = _vector(of_last, F, t, L)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if DEEP:
            hidden_factor = tl.full([L], 1.0, tl.float32)
            if CLIP:
                hidden_factor = clip_factor(hidden_norm, clip)
            own = scores * tl.load(decay + place * LAYERS * L * L + square_at).to(tl.float32)
            own = (-own * hidden_factor[None, :]).to(KIND)
            qa = _weighted(_vector(of_hidden, A, t, L), q, KIND)
            qf = _weighted(_vector(of_hidden, F, t, L), q, KIND)
            scores = tl.zeros([L, L], tl.float32)
            z = tl.zeros([L, D], tl.float32)
            for b in range(0, H, BLOCK):
                hb = b + tl.arange(0, BLOCK)
                w1 = tl.load(hidden_w + hb[:, None] * D + d[None, :])
                s1 = tl.load(hidden_s + hb[:, None] * D + d[None, :])
                back = tl.load(slopes + t[:, None] * H + hb[None, :])
                y = tl.dot(qa, tl.trans(w1), input_precision=PRECISION)
                y = tl.dot(qf, tl.trans(s1), y, input_precision=PRECISION)
                y = tl.dot(own, back, y, input_precision=PRECISION)
                y, _ = gelu(y, ROUGH)
                x = tl.load(made + t[:, None] * H + hb[None, :])
                w2 = tl.load(last_w + d[:, None] * H + hb[None, :])
                s2 = tl.load(last_s + d[:, None] * H + hb[None, :])
                scores = tl.dot(y.to(KIND), tl.trans(x), scores, input_precision=PRECISION)
                z = tl.dot(_weighted(a, y, KIND), tl.trans(w2), z, input_precision=PRECISION)
                z = tl.dot(_weighted(f, y, KIND), tl.trans(s2), z, input_precision=PRECISION)
                if CACHE:
                    open_chunk = cell_field(cells, OPEN, cell, count)
                    kept = located(open_chunk, inputs_offset + layer * inputs_stride, KIND)
                    tl.store(kept + head * L * H + t[:, None] * H + hb[None, :], x)
                    kept = located(open_chunk, back_offset + layer * back_stride, KIND)
                    back32 = back.to(tl.float32) * hidden_factor[:, None]
                    tl.store(kept + head * L * H + t[:, None] * H + hb[None, :], back32)
        else:
            w2 = tl.load(last_m + d[:, None] * D + d[None, :]).to(KIND)
            s2 = tl.load(last_s + d[:, None] * D + d[None, :])
            z = tl.dot(_weighted(a, q, KIND), tl.trans(w2), input_precision=PRECISION)
            z = tl.dot(_weighted(f, q, KIND), tl.trans(s2), z, input_precision=PRECISION)
        weight = tl.load(decay + (place * LAYERS + LAYERS - 1) * L * L + square_at).to(tl.float32)
        z -= tl.dot((scores * weight).to(KIND), scaled.to(KIND), input_precision=PRECISION)
        y = head_norm(finish(z, q.to(tl.float32), D, RESIDUAL, NORM), own_norm, D, epsilon)
        opened = tl.load(
            gates + (cell * CELL + c * L + t)[:, None] * gates_width + gates_column + head * D + d[None, :]
        ).to(tl.float32)
        at = out + (cell * CELL + c * L) * DIM + head * D
        tl.store(at + tile, y / (1.0 + tl.exp(-opened)))
        if CACHE:
            open_chunk = cell_field(cells, OPEN, cell, count)
            kept = located(open_chunk, keys_offset + layer * keys_stride, KIND)
            tl.store(kept + head * L * D + t[:, None] * D + d[None, :], k)
            kept = located(open_chunk, deltas_offset + layer * deltas_stride, KIND)
            tl.store(kept + head * L * D + t[:, None] * D + d[None, :], scaled)

        # The store.
        w = _vector(of_last, W, t, L)
        a_end = _last(of_last, A, L)
        step = tl.zeros([D], tl.float32)
        before = tl.zeros([D], tl.float32)
        if DEEP:
            hidden_step = tl.zeros([BLOCK], tl.float32)
            hidden_before = tl.zeros([BLOCK], tl.float32)
        if STORE:
            m_stores = _stores(w, scaled, k)
            s_stores = _stores(_vector(of_last, S, t, L), scaled, k)
            f_end = _last(of_last, F, L)
            e_end = _last(of_last, E, L)
            if DEEP:
                k_for_m = _weighted(-_vector(of_hidden, W, t, L) * hidden_factor, k, KIND)
                k_for_s = _weighted(-_vector(of_hidden, S, t, L) * hidden_factor, k, KIND)
                ha_end = _last(of_hidden, A, L)
                hf_end = _last(of_hidden, F, L)
                he_end = _last(of_hidden, E, L)
                for b in range(0, H, BLOCK):
                    hb = b + tl.arange(0, BLOCK)
                    at1 = hb[:, None] * D + d[None, :]
                    back = tl.trans(tl.load(slopes + t[:, None] * H + hb[None, :]))
                    new, one, two = _move(
                        hidden_m + at1,
                        hidden_s + at1,
                        back,
                        k_for_m,
                        back,
                        k_for_s,
                        ha_end,
                        hf_end,
                        he_end,
                        PRECISION,
                    )
                    tl.store(hidden_w + at1, new)
                    hidden_step += one
                    hidden_before += two
                    at2 = d[:, None] * H + hb[None, :]
                    x = tl.load(made + t[:, None] * H + hb[None, :])
                    new, one, two = _move(
                        last_m + at2, last_s + at2, m_stores, x, s_stores, x, a_end, f_end, e_end, PRECISION
                    )
                    tl.store(last_w + at2, new)
                    step += one
                    before += two
            else:
                at2 = d[:, None] * D + d[None, :]
                _, step, before = _move(
                    last_m + at2, last_s + at2, m_stores, k, s_stores, k, a_end, f_end, e_end, PRECISION
                )

        # What the chunk did, for the trace.
        theta = _vector(of_last, THETA, t, L)
        whole = last_norm * last_norm
        momentary = whole * theta * theta
        tl.store(norms + (place * LAYERS + LAYERS - 1) * L + t, last_norm)
        told = trace + place * (3 + 2 * LAYERS)
        if DEEP:
            theta = _vector(of_hidden, THETA, t, L)
            square = hidden_norm * hidden_norm
            whole += square
            momentary += square * theta * theta
            tl.store(norms + place * LAYERS * L + t, hidden_norm)
            tl.store(told + 3, tl.sum(hidden_step, 0))
            tl.store(told + 4, tl.sum(hidden_before, 0))
        tl.store(told + 1 + 2 * LAYERS, tl.sum(step, 0))
        tl.store(told + 2 + 2 * LAYERS, tl.sum(before, 0))
        tl.store(told, tl.sum(tl.sqrt(whole), 0))
        tl.store(told + 1, tl.sum(tl.sqrt(momentary), 0))
        gain = float("nan")
        if measured:
            gram = tl.zeros([L, L], tl.float32)
            if DEEP:
                for b in range(0, H, BLOCK):
                    x = tl.load(made + t[:, None] * H + b + tl.arange(0, BLOCK)[None, :])
                    gram = tl.dot(x, tl.trans(x), gram, input_precision=PRECISION)
            else:
                gram = tl.dot(k, tl.trans(k), gram, input_precision=PRECISION)
            curvature = 2.0 * w
            if NORM:
                curvature *= rstd * rstd
            if CLIP:
                curvature *= clip_factor(last_norm, clip)
            both = gram * gram * curvature[:, None] * curvature[None, :]
            lead = tl.sum(curvature * x_norm * x_norm, 0)
            gain = tl.sum(tl.sum(both, 1), 0) / tl.maximum(lead, 1e-30) / (1.0 + a_end)
        tl.store(told + 2, gain)


def launch(width: int) -> dict[str, int]:
    """Of shapes alone, so that bits don't depend on load."""
    return {"BLOCK": min(width, 64), "num_warps": 4, "num_stages": 1}


def learn(
    streams: Tensor,
    columns: tuple[int, int, int],
    gates: Tensor,
    gates_column: int,
    decays: CellDecays,
    work: Tensor,
    norm: Tensor,
    out: Tensor,
    trace: Tensor,
    norms: Tensor,
    where: Where,
    cached: Cached | None,
    width: int,
    architecture: Architecture,
    clip: float | None,
    epsilon: float,
    every: int,
    cells: Tensor,
    cell: int,
) -> None:
    """Store and read each cell's chunks; without ``cached`` the state's memory moves, with it the open
    chunk's cache is filled instead.

    ``streams`` `[cells cell, 3 dim]`: k, q, v at ``columns``. ``gates`` `[cells cell, N]` has the output
    gate, before its sigmoid, from ``gates_column`` on. ``work`` `[cells, H, 2 (L + head_dim), width]` is
    room. ``norm`` `[layers, D]`. ``out`` `[cells cell, dim]`: what was read, normed per head and gated.
    ``trace`` fp32 `[cells, chunks, H, 3 + 2 depth]` (``summary``); ``norms`` fp32
    `[cells, chunks, H, depth, L]`: of the inner gradients, before clipping. The gain is measured of every
    ``every``th chunk of a session. Which kernel runs depends on shapes, the device and ``cached`` alone.
    """
    _, _, heads, depth, length, _ = decays.G.shape
    head_dim = norm.shape[1]
    of_state = [n for i in (0, -1) for pair in (where.memory[i], where.momentum[i]) for n in pair]
    if cached is None and resident is not None and resident.serves(streams, decays, head_dim, width):
        resident.learn(
            streams,
            columns,
            gates,
            gates_column,
            decays,
            norm,
            out,
            trace,
            norms,
            of_state,
            architecture,
            clip,
            epsilon,
            every,
            cells,
            cell,
        )
        return
    of_open = [(0, 0)] * 4
    if cached is not None:
        of_open = [cached.inputs[0], cached.inputs[-1], cached.deltas[0], cached.deltas[-1]]
    learn_kernel[(heads, cells.shape[1])](
        streams,
        gates,
        decays.vectors,
        decays.G,
        work,
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
        *(n for pair in of_open for n in pair),
        K_COLUMN=columns[0],
        Q_COLUMN=columns[1],
        V_COLUMN=columns[2],
        HEADS=heads,
        D=head_dim,
        H=width,
        CELL=cell,
        L=length,
        VECTORS=VECTORS,
        EVERY=every,
        DEEP=depth > 1,
        RESIDUAL=architecture.residual,
        NORM=architecture.norm,
        CLIP=clip is not None,
        STORE=cached is None,
        CACHE=cached is not None,
        ROUGH=streams.dtype == torch.bfloat16,
        PRECISION=PRECISIONS[streams.dtype],
        **launch(width),
    )
