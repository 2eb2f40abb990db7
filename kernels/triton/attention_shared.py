"""``attention`` on a chip that has room: chunks that follow one another are answered at once, of the same
keys and values in shared memory.

One warp calls what is to be seen into a ring (``attention_tiles``), in the order of its positions: persistent
tokens, then chunk by chunk, of a segment what the memory answered and the chunk's own rows together. Groups
of four warps take a chunk of queries each, and leave out what theirs don't see: of a query every number is
the same sum, wherever its cell begins and whoever is beside it. While a group makes the weights of a step,
the tensor cores sum the values of the one before. Written in Gluon, as ``learn_resident`` is.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mnemosyne.kernels.triton.attention_tiles import GROUPS, D, L, barrier, call, first_seen, tile_of, turns
from mnemosyne.kernels.triton.cells import CHUNKS, PLACE, cell_field

VERSIONS = ("3.6.", "3.7.")
"""Of triton that have Gluon as it is used here."""
SHARED = 226 * 1024
"""Bytes of shared memory for queries, the ring and what is stored."""
SPAN = 4
"""Pairs of tiles of a program, at most: more would wait long for a multiprocessor that another lane holds."""
REGISTERS = (224, 56)
"""A thread of the groups after the first, and of the warp that calls. The first group has what is left."""
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _leave_out(full, free, turn, steps, STAGES: gl.constexpr):
    """Steps that others see."""
    for _ in range(steps):
        s = turn % STAGES
        mbarrier.wait(full.index(s), turn // STAGES & 1)
        barrier()
        mbarrier.arrive(free.index(s))
        turn += 1
    return turn


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _made(x):
    """x, rounded here: the compiler would do it just before the next products."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def _ask(q, k_room, full, turn):
    """Scores of a step, begun."""
    STAGES: gl.constexpr = k_room.shape[0]
    KEYS: gl.constexpr = k_room.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    s = turn % STAGES
    mbarrier.wait(full.index(s), turn // STAGES & 1)
    zero = gl.full([L, KEYS], 0.0, gl.float32, SCORES)
    return warpgroup_mma(q, k_room.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _weigh(scores, top, total, scale):
    """Online softmax over one more step: its weights, as an operand; the highest score and the sum of weights
    so far, and by what the sums before shrink."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    highest = gl.maximum(top, gl.max(scores, 1))
    # Each group is compiled by itself: none may round a product that the other leaves whole.
    weights = _exp2(gl.fma(scores, scale, -(highest * scale)[:, None]))
    shrink = _exp2((top - highest) * scale)
    total = gl.fma(total, shrink, gl.sum(weights, 1))
    operand: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    weights = gl.convert_layout(_made(weights.to(gl.bfloat16)), operand, assert_trivial=True)
    return weights, highest, total, gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))


@gluon.jit
def _behind(KEYS: gl.constexpr):
    """By how much a key's place in its chunk is behind a query's, `[L, KEYS]`."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    query = gl.arange(0, L, gl.SliceLayout(1, SCORES))
    key = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES)) % L
    return query[:, None] - key[None, :]


@gluon.jit
def _answer(
    rooms,
    own_rooms,
    work,
    out,
    scale,
    WHICH: gl.constexpr,
    P: gl.constexpr,
    HEADS: gl.constexpr,
    HELD: gl.constexpr,
    SEGMENT: gl.constexpr,
):
    """The WHICH-th chunk of each of the program's tiles."""
    q_room, k_room, v_room, q_full, q_free, full, free = rooms
    out_room, pin = own_rooms
    cells, count, CELL, tiles, units = work
    STAGES: gl.constexpr = k_room.shape[0]
    KEYS: gl.constexpr = k_room.shape[1]
    FIXED: gl.constexpr = P // KEYS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    turn = 0
    taken = 0
    for n in range(turns(units)):
        cell, head, tile, fresh = tile_of(n, tiles, HEADS)
        chunks = cell_field(cells, CHUNKS, cell, count).to(gl.int32)
        if fresh and tile * GROUPS < chunks:
            place = cell_field(cells, PLACE, cell, count)
            begin = first_seen(place, tile * GROUPS, HELD, SEGMENT)
            end = gl.minimum((tile + 1) * GROUPS, chunks)
            chunk = tile * GROUPS + WHICH
            mbarrier.wait(q_full.index(taken % 2), taken // 2 & 1)
            if chunk >= chunks:
                turn = _leave_out(full, free, turn, FIXED + end - begin, STAGES)
            else:
                q = q_room.index(taken % 2).slice(WHICH * L, L)
                first = first_seen(place, chunk, HELD, SEGMENT)
                steps = FIXED + chunk - first

                scores = warpgroup_mma_wait(0, deps=[_ask(q, k_room, full, turn)])
                top = gl.max(scores, 1)
                total = gl.zeros_like(top)
                weights, top, total, shrink = _weigh(scores, top, total, scale)
                acc = gl.full([L, D], 0.0, gl.float32, SUMS)
                for i in range(1, steps):
                    before = turn % STAGES
                    turn += 1
                    if not SEGMENT and i == FIXED:
                        turn = _leave_out(full, free, turn, first - begin, STAGES)
                    scores = _ask(q, k_room, full, turn)
                    acc = warpgroup_mma(weights, v_room.index(before), acc, is_async=True)
                    scores = warpgroup_mma_wait(1, deps=[scores])
                    if not SEGMENT:
                        far = (i == FIXED) & (chunk - first == HELD // L)
                        scores = gl.where(_behind(KEYS) < gl.where(far, 0, L), scores, float("-inf"))
                    following, top, total, shrink = _weigh(scores, top, total, scale)
                    # The assembler would wait before it weighs, but moves no store past a wait.
                    pin.index(WHICH).store(total)
                    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                    barrier()
                    mbarrier.arrive(free.index(before))
                    weights = following
                    acc = acc * shrink[:, None]

                # Its own chunk.
                before = turn % STAGES
                turn += 1
                if not SEGMENT and steps == FIXED:
                    turn = _leave_out(full, free, turn, first - begin, STAGES)
                scores = _ask(q, k_room, full, turn)
                acc = warpgroup_mma(weights, v_room.index(before), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[scores])
                scores = gl.where(_behind(KEYS) >= 0, scores, float("-inf"))
                following, top, total, shrink = _weigh(scores, top, total, scale)
                pin.index(WHICH).store(total)
                acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                barrier()
                mbarrier.arrive(free.index(before))
                mbarrier.arrive(q_free.index(taken % 2))
                acc = acc * shrink[:, None]
                before = turn % STAGES
                acc = warpgroup_mma(following, v_room.index(before), acc, is_async=True)
                share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, SUMS))
                acc = warpgroup_mma_wait(0, deps=[acc])
                barrier()
                mbarrier.arrive(free.index(before))
                turn += 1

                room = out_room.index(WHICH)
                # What was stored from there last has been read.
                tma.store_wait(0)
                barrier()
                room.store((acc * share[:, None]).to(out.dtype))
                fence_async_shared()
                barrier()
                tma.async_copy_shared_to_global(out, [cell * CELL + chunk * L, head * D], room)
                turn = _leave_out(full, free, turn, end - 1 - chunk, STAGES)
            if chunk >= chunks:
                barrier()
                mbarrier.arrive(q_free.index(taken % 2))
            taken += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["count", "tiles", "units"])
def shared_kernel(
    x,
    h,
    persistent_k,
    persistent_v,
    out,
    cells,
    count,
    CELL,
    tiles,
    units,
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
    HEADS: gl.constexpr,
    P: gl.constexpr,
    HELD: gl.constexpr,
    SEGMENT: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Programs take pairs of tiles. Rows by descriptors of a chunk of one head, ``persistent_*`` those of all
    layers and heads one after the other; the rest as in ``attention.attention_kernel``."""
    KEYS: gl.constexpr = 2 * L if SEGMENT else L
    q_room = gl.allocate_shared_memory(x.dtype, [2, GROUPS * L, D], x.layout)
    k_room = gl.allocate_shared_memory(x.dtype, [STAGES, KEYS, D], x.layout)
    v_room = gl.allocate_shared_memory(x.dtype, [STAGES, KEYS, D], x.layout)
    out_room = gl.allocate_shared_memory(out.dtype, [GROUPS, L, D], out.layout)
    pin = gl.allocate_shared_memory(gl.float32, [GROUPS, L], PLAIN)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    rooms = (q_room, k_room, v_room, q_full, q_free, full, free)
    own_rooms = (out_room, pin)
    work = (cells, count, CELL, tiles, units)
    rows = (x, h, persistent_k, persistent_v, column)
    of_state = (
        keys_offset,
        keys_stride,
        values_offset,
        values_stride,
        h_keys_offset,
        h_keys_stride,
        h_values_offset,
        h_values_stride,
    )
    gl.warp_specialize(
        [
            (_answer, (rooms, own_rooms, work, out, scale, 0, P, HEADS, HELD, SEGMENT)),
            (_answer, (rooms, own_rooms, work, out, scale, 1, P, HEADS, HELD, SEGMENT)),
            (call, (rooms, work, rows, of_state, P, HEADS, HELD, SEGMENT)),
        ],
        [4, 1],
        REGISTERS,
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of a device that the kernel can run on; 0: it can't."""
    if device.type != "cuda" or not triton.__version__.startswith(VERSIONS):
        return 0
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count if (found.major, found.minor) == (9, 0) else 0


def serves(x: Tensor, persistent: Tensor, length: int, segment: bool) -> bool:
    """Whether this kernel has the shapes of an attention, and the device what it takes."""
    _, _, tokens, head_dim = persistent.shape
    keys = 2 * L.value if segment else L.value
    fits = (length, head_dim) == (L.value, D.value) and tokens >= keys and tokens % keys == 0
    return fits and x.dtype == torch.bfloat16 and _multiprocessors(x.device) > 0


def attend(
    x: Tensor,
    column: int,
    h: Tensor | None,
    persistent_k: Tensor,
    persistent_v: Tensor,
    out: Tensor,
    of_state: tuple[int, ...],
    rows: int,
    cells: Tensor,
    cell: int,
) -> None:
    """As ``attention.attend``; ``of_state``: offset and layer stride in a state of the keys and values it
    holds, then of those of the memory's answers."""
    _, heads, persistent, head_dim = persistent_k.shape
    operand = gl.NVMMASharedLayout(128, 16, 2)

    def laid(t: Tensor) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(t, [L.value, D.value], operand)

    tiles = triton.cdiv(cell // L.value, GROUPS.value)
    units = cells.shape[1] * heads * triton.cdiv(tiles, 2)
    programs = max(triton.cdiv(units, SPAN), min(units, _multiprocessors(x.device)))
    chunk = L.value * D.value * 2
    step = 2 * chunk * (1 if h is None else 2)
    room = 3 * GROUPS.value * chunk + 1024
    shared_kernel[(programs,)](
        laid(x),
        laid(x if h is None else h),
        laid(persistent_k.view(-1, head_dim)),
        laid(persistent_v.view(-1, head_dim)),
        laid(out),
        cells,
        cells.shape[1],
        cell,
        tiles,
        units,
        column,
        *of_state,
        head_dim**-0.5 * 1.4426950408889634,
        HEADS=heads,
        P=persistent,
        HELD=rows,
        SEGMENT=h is not None,
        STAGES=(SHARED - room) // step,
        REGISTERS=REGISTERS,
        num_warps=4,
    )
