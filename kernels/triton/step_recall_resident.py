"""``step_recall`` with what it reads on the chip before its turn comes, for the shapes and in the ways of
``step_memory_resident``. Written in Gluon, Triton's language with layouts."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mnemosyne.kernels.triton.cells import located
from mnemosyne.kernels.triton.network import finish, gelu
from mnemosyne.kernels.triton.recall import head_norm
from mnemosyne.kernels.triton.step_memory_resident import (
    BLOCK,
    COPIED,
    MEMORY_ROOM,
    OUT,
    PLAIN,
    ROWS,
    UNIT,
    UNITS,
    VECTOR,
    D,
    H,
    convolved,
    rows_before,
    shift,
)
from mnemosyne.kernels.triton.step_product_few import barrier
from mnemosyne.kernels.triton.step_table import OPEN, STATE, begin, open_up, step_field, tails_of


@gluon.jit(do_not_specialize=["count"])
def resident_recall_kernel(
    x,
    out,
    norm,
    taps,
    table,
    count,
    N,
    column,
    channel,
    tails_state,
    tails_open,
    hidden_offset,
    last_offset,
    epsilon,
    HEADS: gl.constexpr,
    CHANNELS: gl.constexpr,
    RESIDUAL: gl.constexpr,
    NORM: gl.constexpr,
):
    """Programs are (session, head)."""
    open_up()
    row = gl.program_id(0).to(gl.int64)
    head = gl.program_id(1)
    own = step_field(table, OPEN, row, count)
    if own == 0:
        return
    state = step_field(table, STATE, row, count)
    SIZE: gl.constexpr = D * H
    KIND: gl.constexpr = x.dtype.element_ty
    unit = gl.arange(0, H, gl.SliceLayout(1, COPIED))
    c = gl.arange(0, D, gl.SliceLayout(0, COPIED))
    m1_room = gl.allocate_shared_memory(gl.float32, [H, D], MEMORY_ROOM)
    first = located(state, hidden_offset, gl.float32) + head * SIZE
    async_copy.async_copy_global_to_shared(m1_room, first + unit[:, None] * D + c[None, :])
    async_copy.commit_group()
    o = gl.arange(0, ROWS, OUT)
    h = gl.arange(0, H, UNIT)
    last = located(state, last_offset, gl.float32) + head * SIZE
    m2 = ()
    for b in gl.static_range(0, D, ROWS):
        m2 = m2 + (gl.load(last + b * H + o[:, None] * H + h[None, :]),)
    d = gl.arange(0, D, VECTOR)
    at = channel + head * D
    rows, scales = rows_before(
        tails_of(table, row, count, tails_state, tails_open, KIND) + at, taps + at, CHANNELS
    )
    own_norm = gl.load(norm + d)

    begin()
    new = gl.load(x + row * N + column + head * D + d)
    q = convolved(new, rows, scales, True)
    async_copy.wait_group(0)
    barrier()  # M1 is there, and every warp has read what is overwritten now
    shift(new, rows, located(own, tails_open, KIND) + at, CHANNELS)
    q_columns = gl.convert_layout(q, gl.SliceLayout(0, UNITS))[None, :]
    a_room = gl.allocate_shared_memory(gl.float32, [H], PLAIN)
    for b in gl.static_range(H // BLOCK):
        m = m1_room.slice(b * BLOCK, BLOCK).load(UNITS)
        a_room.slice(b * BLOCK, BLOCK).store(gl.sum(m * q_columns, 1))
    barrier()
    a, _ = gelu(a_room.load(UNIT))
    z_room = gl.allocate_shared_memory(gl.float32, [D], PLAIN)
    for b in gl.static_range(D // ROWS):
        z_room.slice(b * ROWS, ROWS).store(gl.sum(m2[b] * a[None, :], 1))
    barrier()
    y = finish(z_room.load(VECTOR)[None, :], q[None, :], D, RESIDUAL, NORM)
    y = head_norm(y, own_norm, D, epsilon)
    gl.store(out + row * (HEADS * D) + head * D + d[None, :], y.to(KIND))
