"""The chunks of one head of a cell, one after the other, with the memory on the chip: what a program of
``learn_resident`` does with each part of its share.

Of M1 and M2^T the upper bits are operands. M1's, and the lower bits of both, lie in registers; M2^T's, S1 and
S2^T in shared memory, with a chunk's x^T, its slopes or inner gradients, and two rooms of two tiles for what
comes and goes: k, q and v; y^T; the last sum; k for the stores in S and M. While the product of one half of
the hidden units runs, the other half is worked up, and while the store's run, the output. What the next chunk
begins with is on its way before this one ends. Knows no grid.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from mnemosyne.kernels.triton.cell_gates import THETA, A, E, F, S, W
from mnemosyne.kernels.triton.cells import LAYER, PLACE, STATE, cell_field, located
from mnemosyne.kernels.triton.learn_steps import (
    COLUMN,
    FLAT,
    HALF,
    KIND,
    OPERAND,
    PLAIN,
    ROW,
    ROWS,
    SINGLE,
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
    barrier,
    by_warp_of_tokens,
    fetch_beside,
    gelu,
    half,
    joined,
    make_gradients,
    make_inputs,
    moved,
    opaque,
    over_warps,
    parted,
    parts,
    reads_of,
    ready,
    rejoined,
    room,
    sigmoid,
    start,
    sum_of,
    tell,
    tell_all,
    tile_of,
)
from mnemosyne.kernels.triton.network import clip_factor, finish, length, output_delta
from mnemosyne.kernels.triton.recall import head_norm
from mnemosyne.kernels.triton.scan import _settle as settle


@gluon.jit
def learn_part(
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
    cell,
    head,
    since,
    until,
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
    """Chunks ``since`` to ``until`` of a cell's head. ``hidden`` is the first of two memory layers, ``last``
    the second.

    Rooms are indexed by what is 0 but looks as if it depended on the chunk, and the chunk by what looks as if
    it weren't counted: else the compiler computes every address of every phase before the first chunk, and
    has no registers to keep them in."""
    SIZE: gl.constexpr = D * H
    DIM: gl.constexpr = HEADS * D
    layer = cell_field(cells, LAYER, cell, count)
    state = cell_field(cells, STATE, cell, count)
    first = (cell_field(cells, PLACE, cell, count) // L).to(gl.int32)
    hidden_m = located(state, hidden_m_offset + layer * hidden_m_stride, gl.float32) + head * SIZE
    hidden_s = located(state, hidden_s_offset + layer * hidden_s_stride, KIND) + head * SIZE
    last_m = located(state, last_m_offset + layer * last_m_stride, gl.float32) + head * SIZE
    last_s = located(state, last_s_offset + layer * last_s_stride, KIND) + head * SIZE

    # The state comes on the chip. Its first chunk's numbers are on their way meanwhile.
    s1_room = room(H)
    s2_room = room(H)
    w2_room = room(H)
    made_room = room(H)
    slopes_room = room(H)
    a_room = room(HALF)
    b_room = room(HALF)
    pair_room = room(HALF)
    delta_room = room(L)
    other_room = room(L)
    warps_room = gl.allocate_shared_memory(gl.float32, [1, 8, L], PLAIN)
    t = gl.arange(0, L, ROW)
    d = gl.arange(0, D, COLUMN)
    ts = gl.arange(0, L, SUM_ROW)
    square_at = ts[:, None] * L + gl.arange(0, L, SUM_COLUMN)[None, :]
    barrier()
    fetch_beside(gates, vectors, decay, cell, since, head, gates_width, gates_column, CELL, HEADS, VECTORS)
    at = streams + (cell * CELL + since * L) * 3 * DIM + head * D + t[:, None] * 3 * DIM + d[None, :]
    async_copy.async_copy_global_to_shared(tile_of(a_room, since >> 20, 0), at + K_COLUMN)
    async_copy.async_copy_global_to_shared(tile_of(a_room, since >> 20, 1), at + Q_COLUMN)
    async_copy.async_copy_global_to_shared(tile_of(b_room, since >> 20, 0), at + V_COLUMN)
    async_copy.commit_group()
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
    turned = slopes_room._reinterpret(KIND, [1, D, H], OPERAND).index(0)
    turned.store(gl.load(last_s + dw[:, None] * H + hw[None, :]))
    barrier()
    s2_room.index(0).store(turned.permute((1, 0)).load(UNITS))
    w2 = w2_room.index(0)
    m2a = parted(m2a, half(w2, 0))
    m2b = parted(m2b, half(w2, 1))
    w1a, m1a = parts(m1a)
    w1b, m1b = parts(m1b)

    for turn in range(since, until):
        c = opaque(turn)
        nought = c >> 20
        made = made_room.index(nought)
        slopes = slopes_room.index(nought)
        w2 = w2_room.index(nought)
        k_tile = tile_of(a_room, nought, 0)
        q_tile = tile_of(a_room, nought, 1)
        v_tile = tile_of(b_room, nought, 0)
        place = (cell * (CELL // L) + c) * HEADS + head
        of_hidden = vectors + place * 2 * VECTORS * L
        of_last = of_hidden + VECTORS * L
        zero = gl.zeros([L, D], gl.float32, SUMS)
        wide = gl.full([HALF, L], 0.0, gl.float32, UNITS)

        # The last product, and what of the hidden units the phases after it need.
        async_copy.wait_group(0)
        ready()
        za = start(w1a, k_tile.permute((1, 0)))
        zb = start(w1b, k_tile.permute((1, 0)))
        za = warpgroup_mma_wait(1, deps=[za])
        square = make_inputs(za, half(made, 0), half(slopes, 0))
        zb = warpgroup_mma_wait(0, deps=[zb])
        square += make_inputs(zb, half(made, 1), half(slopes, 1))
        ready()
        z = warpgroup_mma(made.permute((1, 0)), w2, zero, is_async=True)
        warps = warps_room.index(nought)
        warps.store(gl.sum(square, 1))
        k32 = k_tile.load(ROWS).to(gl.float32)
        k_norm = length(k32)
        v = v_tile.load(ROWS).to(gl.float32)
        a_hidden = gl.load(of_hidden + A * L + t)
        f_hidden = gl.load(of_hidden + F * L + t)
        z = warpgroup_mma_wait(0, deps=[z])
        between = pair_room._reinterpret(gl.float32, [1, L, D], SINGLE).index(nought)
        between.store(z)
        barrier()
        z = between.load(ROWS)
        x_square = over_warps(warps)
        delta, rstd = output_delta(z, k32, v, k_norm, D, RESIDUAL, NORM, False)
        last_norm = length(delta) * gl.sqrt(x_square)

        # The inner gradient of the hidden layer, whose norm must be known before any of it is stored.
        nought = c >> 21
        slopes = slopes_room.index(nought)
        w2 = w2_room.index(nought)
        delta_tile = delta_room.index(nought)
        delta_tile.store(delta.to(KIND))
        ready()
        ba = warpgroup_mma(half(w2, 0), delta_tile.permute((1, 0)), wide, is_async=True)
        bb = warpgroup_mma(half(w2, 1), delta_tile.permute((1, 0)), wide, is_async=True)
        scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, is_async=True)
        sa = half(slopes, 0).load(UNITS)
        sb = half(slopes, 1).load(UNITS)
        ba = warpgroup_mma_wait(2, deps=[ba])
        square = make_gradients(ba, sa, half(slopes, 0))
        weight = gl.load(decay + place * 2 * L * L + square_at)
        row = (cell * CELL + c * L + t)[:, None]
        opened = gl.load(gates + row * gates_width + gates_column + head * D + d[None, :])
        q = q_tile.load(ROWS).to(gl.float32)
        qa = tile_of(pair_room, nought, 1)
        qf = other_room.index(nought)
        qa.store((a_hidden[:, None] * q).to(KIND))
        qf.store((f_hidden[:, None] * q).to(KIND))
        bb = warpgroup_mma_wait(1, deps=[bb])
        square += make_gradients(bb, sb, half(slopes, 1))
        warps = warps_room.index(nought)
        warps.store(gl.sum(square, 1))
        barrier()
        hidden_norm = gl.sqrt(over_warps(warps)) * k_norm
        hidden_factor = gl.full([L], 1.0, gl.float32, ROW)
        scores = warpgroup_mma_wait(0, deps=[scores])
        own = scores * weight.to(gl.float32)
        if CLIP:
            hidden_factor = clip_factor(hidden_norm, clip)
            own *= gl.convert_layout(-hidden_factor, SUM_COLUMN)[None, :]
            delta *= clip_factor(last_norm, clip)[:, None]
        else:
            own = -own

        # The read of every token.
        nought = c >> 22
        own_tile = tile_of(pair_room, nought, 0)
        own_tile.store(own.to(KIND))
        slopes = slopes_room.index(nought)
        s1 = s1_room.index(nought)
        qa = tile_of(pair_room, nought, 1).permute((1, 0))
        qf = other_room.index(nought).permute((1, 0))
        reads_a = a_room.index(nought)
        reads_b = b_room.index(nought)
        ready()
        ya = reads_of(w1a, half(s1, 0), half(slopes, 0), qa, qf, own_tile.permute((1, 0)))
        yb = reads_of(w1b, half(s1, 1), half(slopes, 1), qa, qf, own_tile.permute((1, 0)))
        delta_tile = delta_room.index(nought)
        delta_tile.store(delta.to(KIND))
        w = gl.load(of_last + W * L + t)
        s = gl.load(of_last + S * L + t)
        gate = sigmoid(opened.to(gl.float32))
        ya = warpgroup_mma_wait(3, deps=[ya])
        reads_a.store(gelu(ya).to(KIND))
        yb = warpgroup_mma_wait(0, deps=[yb])
        reads_b.store(gelu(yb).to(KIND))
        ready()
        nought = c >> 23
        made = made_room.index(nought)
        w2 = w2_room.index(nought)
        s2 = s2_room.index(nought)
        reads_a = a_room.index(nought).permute((1, 0))
        reads_b = b_room.index(nought).permute((1, 0))
        scores = sum_of(reads_a, reads_b, made, zero)
        kept = sum_of(reads_a, reads_b, w2, zero)
        past = sum_of(reads_a, reads_b, s2, zero)
        weight = gl.load(decay + (place * 2 + 1) * L * L + square_at)
        a = gl.load(of_last + A * L + ts)
        f = gl.load(of_last + F * L + ts)
        at = streams + (cell * CELL + c * L) * 3 * DIM + head * D + t[:, None] * 3 * DIM + d[None, :]
        k16 = gl.load(at + K_COLUMN)
        w_hidden = gl.load(of_hidden + W * L + t)
        s_hidden = gl.load(of_hidden + S * L + t)
        a_end = gl.load(of_last + A * L + L - 1)
        f_end = gl.load(of_last + F * L + L - 1)
        e_end = gl.load(of_last + E * L + L - 1)
        ha_end = gl.load(of_hidden + A * L + L - 1)
        hf_end = gl.load(of_hidden + F * L + L - 1)
        he_end = gl.load(of_hidden + E * L + L - 1)
        delta_m = tile_of(pair_room, nought, 0)
        delta_s = tile_of(pair_room, nought, 1)
        delta_m.store((-w[:, None] * delta).to(KIND))
        delta_s.store((-s[:, None] * delta).to(KIND))
        scores = warpgroup_mma_wait(4, deps=[scores])
        seen_tile = other_room.index(nought)
        seen_tile.store((-scores * weight.to(gl.float32)).to(KIND))
        kept, past = warpgroup_mma_wait(0, deps=[kept, past])
        z = a[:, None] * kept + f[:, None] * past
        ready()
        z = warpgroup_mma(seen_tile, delta_room.index(nought), z, is_async=True)

        # The rest of the store's operands, where the reads were.
        k32 = k16.to(gl.float32)
        k_m = tile_of(b_room, nought, 1)
        k_s = tile_of(b_room, nought, 0)
        k_m.store((-(w_hidden * hidden_factor)[:, None] * k32).to(KIND))
        k_s.store((-(s_hidden * hidden_factor)[:, None] * k32).to(KIND))
        q16 = gl.load(at + Q_COLUMN)
        own_norm = gl.load(norm + layer * D + d + (c >> 27))
        theta_last = gl.load(of_last + THETA * L + t)
        theta_hidden = gl.load(of_hidden + THETA * L + t)
        z = warpgroup_mma_wait(0, deps=[z])
        between = a_room._reinterpret(gl.float32, [1, L, D], SINGLE).index(nought)
        between.store(z)
        ready()
        z = between.load(ROWS)

        # The store, begun before the output is made.
        nought = c >> 24
        made = made_room.index(nought)
        slopes = slopes_room.index(nought)
        s1 = s1_room.index(nought)
        s2 = s2_room.index(nought)
        w2 = w2_room.index(nought)
        told_room = warps_room._reinterpret(gl.float32, [1, 16, 32], PLAIN).index(nought)
        new = warpgroup_mma(half(slopes, 0), k_m, wide, is_async=True)
        carried = warpgroup_mma(half(slopes, 0), k_s, wide, is_async=True)
        y = head_norm(finish(z, q16.to(gl.float32), D, RESIDUAL, NORM), own_norm, D, epsilon)
        to = out + (cell * CELL + c * L) * DIM + head * D + t[:, None] * DIM + d[None, :]
        gl.store(to, (y * gate).to(KIND))

        past = half(s1, 0).load(UNITS).to(gl.float32)
        new = warpgroup_mma_wait(1, deps=[new])
        w1a, m1a = parts(moved(rejoined(w1a, m1a), new, past, ha_end, hf_end, told_room, 0, 0))
        new = warpgroup_mma(half(slopes, 1), k_m, wide, is_async=True)
        carried = warpgroup_mma_wait(1, deps=[carried])
        half(s1, 0).store(settle(carried + he_end * past).to(KIND))
        carried = warpgroup_mma(half(slopes, 1), k_s, wide, is_async=True)
        past = half(s1, 1).load(UNITS).to(gl.float32)
        new = warpgroup_mma_wait(1, deps=[new])
        w1b, m1b = parts(moved(rejoined(w1b, m1b), new, past, ha_end, hf_end, told_room, 1, 0))
        new = warpgroup_mma(half(made, 0), delta_m, wide, is_async=True)
        carried = warpgroup_mma_wait(1, deps=[carried])
        half(s1, 1).store(settle(carried + he_end * past).to(KIND))
        carried = warpgroup_mma(half(made, 0), delta_s, wide, is_async=True)

        # What the next chunk begins with comes where this one has nothing any more.
        barrier()
        if c + 1 < until:
            at = streams + (cell * CELL + (c + 1) * L) * 3 * DIM + head * D
            at = at + t[:, None] * 3 * DIM + d[None, :]
            async_copy.async_copy_global_to_shared(tile_of(a_room, nought, 0), at + K_COLUMN)
            async_copy.async_copy_global_to_shared(tile_of(a_room, nought, 1), at + Q_COLUMN)
            async_copy.async_copy_global_to_shared(tile_of(b_room, nought, 0), at + V_COLUMN)
            fetch_beside(
                gates, vectors, decay, cell, c + 1, head, gates_width, gates_column, CELL, HEADS, VECTORS
            )
        async_copy.commit_group()

        past = half(s2, 0).load(UNITS).to(gl.float32)
        old = joined(half(w2, 0), m2a)
        new = warpgroup_mma_wait(1, deps=[new])
        old = moved(old, new, past, a_end, f_end, told_room, 0, 2)
        new = warpgroup_mma(half(made, 1), delta_m, wide, is_async=True)
        m2a = parted(old, half(w2, 0))
        carried = warpgroup_mma_wait(1, deps=[carried])
        half(s2, 0).store(settle(carried + e_end * past).to(KIND))
        carried = warpgroup_mma(half(made, 1), delta_s, wide, is_async=True)
        past = half(s2, 1).load(UNITS).to(gl.float32)
        old = joined(half(w2, 1), m2b)
        new = warpgroup_mma_wait(1, deps=[new])
        old = moved(old, new, past, a_end, f_end, told_room, 1, 2)
        m2b = parted(old, half(w2, 1))
        carried = warpgroup_mma_wait(0, deps=[carried])
        half(s2, 1).store(settle(carried + e_end * past).to(KIND))

        # What the chunk did, for the trace.
        whole = last_norm * last_norm
        momentary = whole * theta_last * theta_last
        square = hidden_norm * hidden_norm
        whole += square
        momentary += square * theta_hidden * theta_hidden
        gl.store(norms + place * 2 * L + t, hidden_norm)
        gl.store(norms + (place * 2 + 1) * L + t, last_norm)
        told = trace + place * 7
        tell(told_room, 0, 4, by_warp_of_tokens(gl.sqrt(whole)))
        tell(told_room, 0, 5, by_warp_of_tokens(gl.sqrt(momentary)))
        barrier()
        tell_all(told_room, told)
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

    # The state goes back, by addresses of which the compiler doesn't know that it had them before: it would
    # keep them all the time.
    barrier()
    nought = opaque(0)
    hidden_m += nought * 16
    hidden_s += nought * 16
    last_m += nought * 16
    last_s += nought * 16
    w2 = w2_room.index(nought)
    gl.store(hidden_m + at_hidden, rejoined(w1a, m1a))
    gl.store(hidden_m + HALF * D + at_hidden, rejoined(w1b, m1b))
    gl.store(last_m + at_last, joined(half(w2, 0), m2a))
    gl.store(last_m + HALF + at_last, joined(half(w2, 1), m2b))
    gl.store(hidden_s + hf[:, None] * D + df[None, :], s1_room.index(nought).load(FLAT))
    turned = slopes_room._reinterpret(KIND, [1, D, H], OPERAND).index(nought)
    turned.permute((1, 0)).store(s2_room.index(nought).load(UNITS))
    barrier()
    gl.store(last_s + dw[:, None] * H + hw[None, :], turned.load(WIDE))
