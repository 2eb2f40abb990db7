"""``step_product`` for few rows, when nothing but weights is read: a program has all of its weights on their
way into shared memory while the launch before still runs, and what it does after that is short.

Beside ``product_kernel`` for rows up to ``LARGEST``, with the same bits: a sum is made of chains over ranges
of RANGE numbers of K, added up in order. Here every warp has chains of its own, all of them at once. Weights
are the tensor cores' left operand, 16 rows a program, which is little enough that programs of the next
launch find room beside these. Written in Gluon, Triton's language with layouts. Knows no session.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from mnemosyne.kernels.triton.step_table import begin, open_up

VERSIONS = ("3.6.", "3.7.")
"""Of triton that have Gluon as it is used here: it still changes from one to the next."""
WARPS = gl.constexpr(4)
RANGE = gl.constexpr(128)
"""Of K, the length of one chain."""
TILE = gl.constexpr(16)
"""Rows of weights a program."""
LARGEST = 8
"""Rows that are few; with 16 of them large tiles are faster."""
MOST = 5632
"""K whose weights a program has room for."""

COPIED = gl.constexpr(gl.BlockedLayout([1, 1, 8], [1, 2, 16], [4, 1, 1], [2, 1, 0]))
"""Weights `[warps, TILE, RANGE]` on their way: 16 bytes a thread, in the warp that will take them."""
ROOM = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
"""A chain of each warp, `[warps, TILE, rows]`."""
LEFT = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, SUMS.value, 2))
CHAINS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
CHAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Its name from Triton 3.7 on, and before."""


@gluon.jit
def _added(chains, COUNT: gl.constexpr, FIRST: gl.constexpr, MADE: gl.constexpr, layout: gl.constexpr):
    """All chains of the MADE rows of weights from FIRST on, in order."""
    total = chains.index(0).slice(FIRST, MADE).load(layout)
    for i in gl.static_range(1, COUNT):
        total += chains.index(i).slice(FIRST, MADE).load(layout)
    return total


@gluon.jit
def _rows(at, here, k, first, K: gl.constexpr):
    return gl.load(at + first, mask=here & (k + first < K), other=0.0)


@gluon.jit(do_not_specialize=["rows"])
def few_product_kernel(
    a,
    weight,
    out,
    gates,
    bias,
    logits,
    rows,
    N,
    K: gl.constexpr,
    GATES: gl.constexpr,
    ROWS: gl.constexpr,
    KIND: gl.constexpr,
):
    """As ``product_kernel``, by pointers. Two halves of a program's weights belong together where values have
    a gate ("swiglu") or gates have parts."""
    TURN: gl.constexpr = WARPS * RANGE
    TURNS: gl.constexpr = (K + TURN - 1) // TURN
    PAIRED: gl.constexpr = KIND == "swiglu"
    MADE: gl.constexpr = TILE // 2 if PAIRED else TILE
    open_up()
    column = gl.program_id(0) * MADE
    of_gates = GATES > 0 and column >= N

    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, COPIED)))
    n = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(2, COPIED)))
    k = gl.arange(0, RANGE, gl.SliceLayout(0, gl.SliceLayout(1, COPIED)))
    k = warp[:, None, None] * RANGE + k[None, None, :]
    source = weight
    row = column + n
    if PAIRED:
        row = gl.where(n < MADE, column + n, N + column + n - MADE)
    if GATES:  # noqa: SIM102 (known when it is compiled)
        if of_gates:
            source = gates
            row -= N
    at = source + row.to(gl.int64)[None, :, None] * K + k
    room = gl.allocate_shared_memory(gl.bfloat16, [TURNS, WARPS, TILE, RANGE], ROOM)
    for i in gl.static_range(TURNS):
        if (i + 1) * TURN <= K:
            async_copy.async_copy_global_to_shared(room.index(i), at + i * TURN)
        else:
            there = (row >= 0)[None, :, None] & (k + i * TURN < K)
            async_copy.async_copy_global_to_shared(room.index(i), at + i * TURN, mask=there)
    async_copy.commit_group()
    begin()

    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))
    k = gl.arange(0, RANGE, gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))
    t = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))
    k = warp[:, None, None] * RANGE + k[None, :, None]
    at = a + t[None, None, :] * K + k
    here = t[None, None, :] < rows
    made_layout: gl.constexpr = gl.BlockedLayout([1, 1], [MADE, 32 // MADE], [1, 4], [0, 1])
    c = column + gl.arange(0, MADE, gl.SliceLayout(1, made_layout))
    r = gl.arange(0, ROWS, gl.SliceLayout(0, made_layout))
    to = out + r[None, :] * N + c[:, None]
    inside = (r < rows)[None, :] & (c < N)[:, None]
    before = 0.0
    if KIND == "add":
        before = gl.load(to, mask=inside, other=0.0)
    # As many registers as rows: all that there are come at once, or a turn's.
    WHOLE: gl.constexpr = TURNS * ROWS <= 64
    x = ()
    if WHOLE:
        for i in gl.static_range(TURNS):
            x = x + (_rows(at, here, k, i * TURN, K),)
    async_copy.wait_group(0)
    barrier()
    zero = gl.zeros([WARPS, TILE, ROWS], gl.float32, SUMS)
    sums = ()
    for i in gl.static_range(TURNS):
        right = x[i] if WHOLE else _rows(at, here, k, i * TURN, K)
        sums = sums + (mma_v2(room.index(i).load(LEFT), right, zero),)
    barrier()
    chains = gl.allocate_shared_memory(gl.float32, [TURNS, WARPS, TILE, ROWS], CHAINS)
    for i in gl.static_range(TURNS):
        chains.index(i).store(sums[i])
    barrier()
    COUNT: gl.constexpr = (K + RANGE - 1) // RANGE
    chain = chains._reinterpret(gl.float32, [TURNS * WARPS, TILE, ROWS], CHAIN)
    if GATES:  # noqa: SIM102 (known when it is compiled)
        if of_gates:
            half: gl.constexpr = TILE // 2
            layout: gl.constexpr = gl.BlockedLayout([1, 1], [half, 32 // half], [1, 4], [0, 1])
            z = _added(chain, COUNT, 0, half, layout) + _added(chain, COUNT, half, half, layout)
            gate = (column - N) // 2 + gl.arange(0, half, gl.SliceLayout(1, layout))
            told = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
            z += gl.load(bias + gate)[:, None]
            gl.store(logits + told[None, :] * GATES + gate[:, None], z, mask=(told < rows)[None, :])
            return
    made = _added(chain, COUNT, 0, MADE, made_layout)
    if PAIRED:
        opened = _added(chain, COUNT, MADE, MADE, made_layout)
        made = made * opened / (1.0 + gl.exp(-opened))
    if KIND == "add":
        made += before
    gl.store(to, made.to(out.dtype.element_ty), mask=inside)


def serves(rows: int, columns: int, K: int, dtype: torch.dtype, kind: str, parts: int) -> bool:
    """Whether this kernel has the shapes that ``product`` was given, on a Hopper GPU."""
    fits = columns % TILE.value == 0 and K % 64 == 0 and K <= MOST and parts in (0, 2)
    return (
        rows <= LARGEST
        and fits
        and dtype == torch.bfloat16
        and triton.__version__.startswith(VERSIONS)
        and not triton.knobs.runtime.interpret
    )


def few_product(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    kind: str,
    gates: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Arguments as of ``product``."""
    rows, N = out.shape
    of_gates, bias, logits = gates or (weight, out, out)
    made = TILE.value // 2 if kind == "swiglu" else TILE.value
    more = 0 if gates is None else of_gates.shape[0]
    programs = triton.cdiv(N, made) + more // TILE.value
    few_product_kernel[(programs,)](
        a,
        weight,
        out,
        of_gates,
        bias,
        logits,
        rows,
        N,
        K=a.shape[1],
        GATES=0 if gates is None else logits.shape[1],
        ROWS=max(8, triton.next_power_of_2(rows)),
        KIND=kind,
        num_warps=WARPS.value,
        launch_pdl=True,
    )
