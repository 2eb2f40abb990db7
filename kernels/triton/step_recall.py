"""MAC's h for one token a session: the query's convolution, the read of the memory as it was at the segment's
start, the norm per head. Counterpart of ``streams`` and ``recall`` where there is one row and no tile."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.kernels.triton import step_memory_resident, step_recall_resident
from mnemosyne.kernels.triton.cells import located
from mnemosyne.kernels.triton.network import finish, gelu
from mnemosyne.kernels.triton.recall import head_norm
from mnemosyne.kernels.triton.step_table import OPEN, STATE, begin, convolved, shift, step_field, tails_of


@triton.jit(do_not_specialize=["count"])
def step_recall_kernel(
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
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DEEP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
):
    """Programs are (session, head)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    own = step_field(table, OPEN, row, count)
    state = step_field(table, STATE, row, count)
    begin()
    if own == 0:
        return
    SIZE: tl.constexpr = D * H
    KIND: tl.constexpr = x.dtype.element_ty
    last = located(state, last_offset, tl.float32) + head * SIZE
    d = tl.arange(0, D)
    new = x + row * N + column + head * D
    tails = tails_of(table, row, count, tails_state, tails_open, KIND) + channel + head * D
    q = convolved(new, tails, taps + channel + head * D, CHANNELS, K, D, True)
    if DEEP:
        hidden = located(state, hidden_offset, tl.float32) + head * SIZE
        products = tl.zeros([D, BLOCK], tl.float32)
        for b in tl.range(0, H, BLOCK, num_stages=STAGES):
            hb = b + tl.arange(0, BLOCK)
            first = tl.load(hidden + hb[:, None] * D + d[None, :])
            second = tl.load(last + d[:, None] * H + hb[None, :])
            a, _ = gelu(tl.sum(first * q[None, :], 1))
            products += second * a[None, :]
        z = tl.sum(products, 1)
    else:
        z = tl.sum(tl.load(last + d[:, None] * D + d[None, :]) * q[None, :], 1)
    y = finish(z[None, :], q[None, :], D, RESIDUAL, NORM)
    y = head_norm(y, tl.load(norm + d), D, epsilon)
    tl.store(out + row * (HEADS * D) + head * D + d[None, :], y)
    kept = located(own, tails_open, KIND) + channel + head * D
    tl.debug_barrier()  # every thread has read the tails
    shift(new, tails, kept, CHANNELS, K, D)


def step_recall(
    x: Tensor,
    column: int,
    channel: int,
    out: Tensor,
    norm: Tensor,
    taps: Tensor,
    table: Tensor,
    tails: tuple[int, int],
    memory: Sequence[int],
    width: int,
    architecture: Architecture,
    epsilon: float,
) -> None:
    """``out`` `[sessions, dim]` from the queries at ``column`` of ``x`` `[sessions, N]`; their tails move on.

    ``taps`` `[K, S dim]`, the queries' from ``channel`` on; ``norm`` `[D]`. Bytes behind the state's address:
    ``memory``, each memory layer of M*, fp32, ``width`` its hidden units (head_dim without); ``tails`` in the
    state and in the open chunk.
    """
    head_dim = norm.shape[0]
    heads = out.shape[1] // head_dim
    if step_memory_resident.serves(x.dtype, len(memory), head_dim, width, 64, taps.shape[0]):
        step_recall_resident.resident_recall_kernel[(table.shape[1], heads)](
            x,
            out,
            norm,
            taps,
            table,
            table.shape[1],
            x.shape[1],
            column,
            channel,
            *tails,
            *memory,
            epsilon,
            HEADS=heads,
            CHANNELS=taps.shape[1],
            RESIDUAL=architecture.residual,
            NORM=architecture.norm,
            num_warps=step_memory_resident.WARPS,
            launch_pdl=True,
        )
        return
    step_recall_kernel[(table.shape[1], heads)](
        x,
        out,
        norm,
        taps,
        table,
        table.shape[1],
        x.shape[1],
        column,
        channel,
        *tails,
        memory[0],
        memory[-1],
        epsilon,
        HEADS=heads,
        CHANNELS=taps.shape[1],
        K=taps.shape[0],
        D=head_dim,
        H=width,
        BLOCK=min(width, 64),
        STAGES=3,
        DEEP=len(memory) > 1,
        RESIDUAL=architecture.residual,
        NORM=architecture.norm,
        num_warps=4,
        launch_pdl=True,
    )
