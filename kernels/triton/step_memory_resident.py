"""``step_memory`` with what it reads on the chip before its turn comes: the memory is asked for while the
launch before still runs, the first layer's M and S to shared memory, the last layer's M to registers; its S
and what the chunk's earlier tokens stored follow to where the first layer was.

Beside ``step_memory`` because the chip holds the memory of one shape alone (``serves``), which is then
served by this kernel whatever the number of sessions. Vectors of a head's width are in every warp, so that a
sum over one is no barrier. Written in Gluon, Triton's language with layouts.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mnemosyne.kernels.triton.cell_gates import gate
from mnemosyne.kernels.triton.cells import located
from mnemosyne.kernels.triton.network import TINY, finish, gelu, output_delta
from mnemosyne.kernels.triton.recall import head_norm
from mnemosyne.kernels.triton.step_product_few import VERSIONS, barrier
from mnemosyne.kernels.triton.step_table import INDEX, OPEN, STATE, begin, open_up, step_field, tails_of

D = gl.constexpr(64)
L = gl.constexpr(64)
H = gl.constexpr(256)
K = gl.constexpr(4)
"""Taps of the convolution."""
BLOCK = gl.constexpr(64)
"""Hidden units at a time."""
WARPS = 8
FEW = 512
"""Most programs that are few: the heads of some twenty sessions of 760M."""
REGISTERS = 160, 128
"""A thread, of few programs, which then keep all in them, and of many, two of which share a multiprocessor.
The compiler spills after it has chosen the operations: bits are the same."""

SINGLE = gl.constexpr(gl.BlockedLayout([1, 2], [1, 32], [8, 1], [1, 0]))
"""`[1, D]` and `[1, L]`."""
VECTOR = gl.constexpr(gl.SliceLayout(0, SINGLE.value))
UNITS = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [8, 1], [1, 0]))
"""First layer `[BLOCK, D]`."""
ROWS = gl.constexpr(16)
OUTS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
"""ROWS at a time of the last layer `[D, H]`, and of tokens' hidden units `[L, H]`."""
COPIED_WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
"""What is as wide on its way."""
KEYS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
"""Tokens `[L, D]`."""
UNIT = gl.constexpr(gl.SliceLayout(0, OUTS.value))
"""`[H]`."""
OUT = gl.constexpr(gl.SliceLayout(1, OUTS.value))
"""`[ROWS]`."""
COPIED = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0]))
MEMORY_ROOM = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
TOKEN_ROOM = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 1, [1, 0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def rows_before(tails, taps, CHANNELS: gl.constexpr):
    """Of one head of a stream: its rows before the token, and all taps."""
    d = gl.arange(0, D, VECTOR)
    rows = ()
    scales = ()
    for i in gl.static_range(K):
        if i + 1 < K:
            rows = rows + (gl.load(tails + i * CHANNELS + d),)
        scales = scales + (gl.load(taps + i * CHANNELS + d),)
    return rows, scales


@gluon.jit
def convolved(new, rows, scales, KEY: gl.constexpr):
    """As ``step_table.convolved``."""
    mixed = new.to(gl.float32) * scales[K - 1]
    for i in gl.static_range(K - 1):
        mixed += rows[i].to(gl.float32) * scales[i]
    mixed = mixed / (1.0 + gl.exp(-mixed))
    if KEY:
        mixed *= 1.0 / gl.sqrt(gl.sum(mixed * mixed, 0) + 1e-6)
    return mixed


@gluon.jit
def shift(new, rows, kept, CHANNELS: gl.constexpr):
    d = gl.arange(0, D, VECTOR)
    for i in gl.static_range(K - 1):
        gl.store(kept + i * CHANNELS + d, rows[i + 1] if i + 2 < K else new)


@gluon.jit
def _decays(decay, rows, gated, index, GATES: gl.constexpr):
    """A, F, E and the rows of G and P of a memory layer, before the token."""
    begun = index > 0
    A = gl.load(decay + gated, mask=begun, other=1.0)
    F = gl.load(decay + GATES + gated, mask=begun, other=0.0)
    E = gl.load(decay + 2 * GATES + gated, mask=begun, other=1.0)
    j = gl.arange(0, L, VECTOR)
    G = gl.load(rows + gated * L + j, mask=j < index, other=0.0)
    P = gl.load(rows + GATES * L + gated * L + j, mask=j < index, other=0.0)
    return A, F, E, G, P


@gluon.jit
def _extended(
    logits, decay, rows, gated, index, before, theta_max, eta_max, alpha_max, epsilon, GATES: gl.constexpr
):
    """Take the token in; A, F and theta, and G of the tokens before it."""
    A, F, E, G, P = before
    theta = gate(gl.load(logits + gated), theta_max, epsilon)
    eta = gate(gl.load(logits + GATES + gated), eta_max, epsilon)
    keep = 1.0 - gate(gl.load(logits + 2 * GATES + gated), alpha_max, epsilon)
    A = keep * A
    E = eta * E
    F = keep * F + E
    P = eta * P
    G = keep * G + P
    gl.store(decay + gated, A)
    gl.store(decay + GATES + gated, F)
    gl.store(decay + 2 * GATES + gated, E)
    j = gl.arange(0, L, VECTOR)
    gl.store(rows + GATES * L + gated * L + j, gl.where(j == index, theta, P), mask=j <= index)
    gl.store(rows + gated * L + j, gl.where(j == index, theta, G), mask=j <= index)
    return A, F, theta, G


@gluon.jit
def _clipped(delta, square, clip, CLIP: gl.constexpr):
    """As in ``step_memory``."""
    if CLIP:
        delta *= gl.minimum(clip / gl.maximum(gl.sqrt(square), TINY), 1.0)
    return delta


@gluon.jit(do_not_specialize=["count"])
def resident_memory_kernel(
    x,
    logits,
    out,
    norm,
    taps,
    table,
    count,
    N,
    q_column,
    k_column,
    v_column,
    q_channel,
    k_channel,
    v_channel,
    gate_column,
    tails_state,
    tails_open,
    hidden_m,
    last_m,
    hidden_s,
    last_s,
    keys_offset,
    inputs_offset,
    hidden_deltas_offset,
    last_deltas_offset,
    decay_offset,
    rows_offset,
    theta_max,
    eta_max,
    alpha_max,
    gate_epsilon,
    clip,
    epsilon,
    LOGITS: gl.constexpr,
    HEADS: gl.constexpr,
    CHANNELS: gl.constexpr,
    RESIDUAL: gl.constexpr,
    NORM: gl.constexpr,
    CLIP: gl.constexpr,
):
    """Programs are (session, head). What lies in the open chunk and is read ahead, steps before this one have
    written, and nothing else in this one does."""
    open_up()
    row = gl.program_id(0).to(gl.int64)
    head = gl.program_id(1)
    own = step_field(table, OPEN, row, count)
    if own == 0:
        return
    state = step_field(table, STATE, row, count)
    index = step_field(table, INDEX, row, count).to(gl.int32)
    SIZE: gl.constexpr = D * H
    GATES: gl.constexpr = HEADS * 2
    KIND: gl.constexpr = x.dtype.element_ty

    # The memory.
    unit = gl.arange(0, H, gl.SliceLayout(1, COPIED))
    column = gl.arange(0, D, gl.SliceLayout(0, COPIED))
    m1_room = gl.allocate_shared_memory(gl.float32, [H, D], MEMORY_ROOM)
    m_start = located(state, hidden_m, gl.float32) + head * SIZE
    async_copy.async_copy_global_to_shared(m1_room, m_start + unit[:, None] * D + column[None, :])
    async_copy.commit_group()
    o = gl.arange(0, ROWS, OUT)
    h = gl.arange(0, H, UNIT)
    at_rows = o[:, None] * H + h[None, :]
    last = located(state, last_m, gl.float32) + head * SIZE
    m2 = ()
    for b in gl.static_range(0, D, ROWS):
        m2 = m2 + (gl.load(last + b * H + at_rows),)
    s_start = located(state, hidden_s, KIND) + head * SIZE
    u = gl.arange(0, H, gl.SliceLayout(1, KEYS))
    e = gl.arange(0, D, gl.SliceLayout(0, KEYS))
    s1_room = gl.allocate_shared_memory(KIND, [H, D], TOKEN_ROOM)
    async_copy.async_copy_global_to_shared(s1_room, s_start + u[:, None] * D + e[None, :])
    async_copy.commit_group()

    # What the token's predecessors left.
    d = gl.arange(0, D, VECTOR)
    tails = tails_of(table, row, count, tails_state, tails_open, KIND) + head * D
    kept = located(own, tails_open, KIND) + head * D
    taps += head * D
    q_rows, q_taps = rows_before(tails + q_channel, taps + q_channel, CHANNELS)
    k_rows, k_taps = rows_before(tails + k_channel, taps + k_channel, CHANNELS)
    v_rows, v_taps = rows_before(tails + v_channel, taps + v_channel, CHANNELS)
    decay = (own + decay_offset).to(gl.pointer_type(gl.float32))
    rows = located(own, rows_offset, gl.float32)
    hidden_before = _decays(decay, rows, head * 2, index, GATES)
    last_before = _decays(decay, rows, head * 2 + 1, index, GATES)
    t = gl.arange(0, L, gl.SliceLayout(1, KEYS))
    at_key = t[:, None] * D + e[None, :]
    earlier = (t < index)[:, None]
    keys = located(own, keys_offset, KIND) + head * L * D
    deltas = located(own, last_deltas_offset, KIND) + head * L * D
    inputs = located(own, inputs_offset, KIND) + head * L * H
    hidden_deltas = located(own, hidden_deltas_offset, KIND) + head * L * H
    own_norm = gl.load(norm + d)

    begin()
    new = x + row * N + head * D + d
    q_new = gl.load(new + q_column)
    k_new = gl.load(new + k_column)
    v_new = gl.load(new + v_column)
    opened = gl.load(new + gate_column).to(gl.float32)
    q = convolved(q_new, q_rows, q_taps, True)
    k = convolved(k_new, k_rows, k_taps, True)
    v = convolved(v_new, v_rows, v_taps, False)
    async_copy.wait_group(0)
    barrier()  # M1 is there, and every warp has read what is overwritten now
    shift(q_new, q_rows, kept + q_channel, CHANNELS)
    shift(k_new, k_rows, kept + k_channel, CHANNELS)
    shift(v_new, v_rows, kept + v_channel, CHANNELS)
    logits += row * LOGITS
    a1, f1, theta1, g1 = _extended(
        logits,
        decay,
        rows,
        head * 2,
        index,
        hidden_before,
        theta_max,
        eta_max,
        alpha_max,
        gate_epsilon,
        GATES,
    )
    a2, f2, theta2, g2 = _extended(
        logits,
        decay,
        rows,
        head * 2 + 1,
        index,
        last_before,
        theta_max,
        eta_max,
        alpha_max,
        gate_epsilon,
        GATES,
    )

    # The first layer, at k and, as it is by now, at q.
    at_k = gl.allocate_shared_memory(gl.float32, [H], PLAIN)
    at_q = gl.allocate_shared_memory(gl.float32, [H], PLAIN)
    k_columns = gl.convert_layout(k, gl.SliceLayout(0, UNITS))[None, :]
    q_columns = gl.convert_layout(q, gl.SliceLayout(0, UNITS))[None, :]
    for b in gl.static_range(H // BLOCK):
        m = m1_room.slice(b * BLOCK, BLOCK).load(UNITS)
        at_k.slice(b * BLOCK, BLOCK).store(gl.sum(m * k_columns, 1))
        s = s1_room.slice(b * BLOCK, BLOCK).load(UNITS)
        m = a1 * m + f1 * s.to(gl.float32)
        at_q.slice(b * BLOCK, BLOCK).store(gl.sum(m * q_columns, 1))
    barrier()
    a, slope = gelu(at_k.load(UNIT))

    # What the chunk's earlier tokens stored is on its way to where M1 was, and S.
    past = gl.arange(0, L, gl.SliceLayout(1, COPIED_WIDE))
    wide = gl.arange(0, H, gl.SliceLayout(0, COPIED_WIDE))
    at_token = past[:, None] * H + wide[None, :]
    before = (past < index)[:, None] & (wide >= 0)[None, :]
    deltas_room = gl.allocate_shared_memory(KIND, [L, H], TOKEN_ROOM)
    inputs_room = gl.allocate_shared_memory(KIND, [L, H], TOKEN_ROOM)
    async_copy.async_copy_global_to_shared(deltas_room, hidden_deltas + at_token, mask=before)
    async_copy.commit_group()
    last = located(state, last_s, KIND) + head * SIZE
    s2_room = gl.allocate_shared_memory(KIND, [D, H], TOKEN_ROOM)
    async_copy.async_copy_global_to_shared(s2_room, last + at_token)
    async_copy.async_copy_global_to_shared(inputs_room, inputs + at_token, mask=before)
    async_copy.commit_group()
    key = gl.load(keys + at_key, mask=earlier, other=0.0)
    delta_rows = gl.load(deltas + at_key, mask=earlier, other=0.0)

    # The loss, and its gradient back.
    z_room = gl.allocate_shared_memory(gl.float32, [D], PLAIN)
    for b in gl.static_range(D // ROWS):
        z_room.slice(b * ROWS, ROWS).store(gl.sum(m2[b] * a[None, :], 1))
    barrier()
    z = z_room.load(VECTOR)
    delta, _ = output_delta(z[None, :], k[None, :], v[None, :], 0.0, D, RESIDUAL, NORM, False)
    delta = gl.convert_layout(gl.reshape(delta, [D]), VECTOR)
    delta_room = gl.allocate_shared_memory(gl.float32, [D], PLAIN)
    delta_room.store(delta)
    # What earlier tokens stored in the first layer, by how near their keys are to the query.
    q_row = gl.convert_layout(q, gl.SliceLayout(0, KEYS))
    weight = gl.sum(key.to(gl.float32) * q_row[None, :], 1)
    weight *= gl.convert_layout(g1, gl.SliceLayout(1, KEYS))
    weight_room = gl.allocate_shared_memory(gl.float32, [L], PLAIN)
    weight_room.store(weight)
    barrier()
    sums = gl.zeros([ROWS, H], gl.float32, OUTS)
    for b in gl.static_range(D // ROWS):
        sums += m2[b] * delta_room.slice(b * ROWS, ROWS).load(OUT)[:, None]
    back = gl.sum(sums, 0) * slope
    back = _clipped(back, gl.sum(back * back, 0) * gl.sum(k * k, 0), clip, CLIP)
    delta = _clipped(delta, gl.sum(delta * delta, 0) * gl.sum(a * a, 0), clip, CLIP)
    gl.store(keys + index * D + d, k.to(KIND))
    gl.store(deltas + index * D + d, delta.to(KIND))
    gl.store(inputs + index * H + h, a.to(KIND))
    at_k.store(a)  # until it is wanted again
    gl.store(hidden_deltas + index * H + h, back.to(KIND))

    # The read.
    async_copy.wait_group(1)
    barrier()
    sums = gl.zeros([ROWS, H], gl.float32, OUTS)
    for b in gl.static_range(L // ROWS):
        weight = weight_room.slice(b * ROWS, ROWS).load(OUT)[:, None]
        sums += deltas_room.slice(b * ROWS, ROWS).load(OUTS).to(gl.float32) * weight
    stood = at_q.load(UNIT) - gl.sum(sums, 0)
    stood -= theta1 * gl.sum(k * q, 0) * back
    stood, _ = gelu(stood)
    async_copy.wait_group(0)
    barrier()
    near_room = gl.allocate_shared_memory(gl.float32, [L], PLAIN)
    read_room = gl.allocate_shared_memory(gl.float32, [D], PLAIN)
    for b in gl.static_range(L // ROWS):
        made = inputs_room.slice(b * ROWS, ROWS).load(OUTS).to(gl.float32)
        near_room.slice(b * ROWS, ROWS).store(gl.sum(made * stood[None, :], 1))
        s = s2_room.slice(b * ROWS, ROWS).load(OUTS)
        m = a2 * m2[b] + f2 * s.to(gl.float32)
        read_room.slice(b * ROWS, ROWS).store(gl.sum(m * stood[None, :], 1))
    barrier()
    weight = near_room.load(gl.SliceLayout(1, KEYS)) * gl.convert_layout(g2, gl.SliceLayout(1, KEYS))
    stored = gl.sum(delta_rows.to(gl.float32) * weight[:, None], 0)
    z = read_room.load(VECTOR) - gl.convert_layout(stored, VECTOR)
    z -= theta2 * gl.sum(at_k.load(UNIT) * stood, 0) * delta
    y = finish(z[None, :], q[None, :], D, RESIDUAL, NORM)
    y = head_norm(y, own_norm, D, epsilon) / (1.0 + gl.exp(-opened))[None, :]
    gl.store(out + row * (HEADS * D) + head * D + d[None, :], y.to(KIND))


def registers(programs: int) -> int:
    """A thread."""
    return REGISTERS[programs > FEW]


def serves(dtype: torch.dtype, depth: int, head_dim: int, width: int, chunk: int, taps: int) -> bool:
    """Whether this kernel has the shapes that ``step_memory`` was given, on a Hopper GPU."""
    shape = depth, head_dim, width, chunk, taps
    return (
        shape == (2, D.value, H.value, L.value, K.value)
        and dtype == torch.bfloat16
        and triton.__version__.startswith(VERSIONS)
        and not triton.knobs.runtime.interpret
    )
