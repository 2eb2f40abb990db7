"""``gemm`` for cells of whole tiles of rows: a program takes tile after tile, and what a tile leaves is
stored while the next one's product runs.

One warp calls operands into a ring in shared memory; two groups of four warps take the program's tiles in
turn, so that the tensor cores have one group's product while the other stores. An element is the same sum as
in ``gemm``, in steps of 16 over K: which of the two computes it, no bit tells. What is to have rotary
positions gets them here, as ``streams.rotate`` would give them. Written in Gluon, as ``learn_resident`` is.
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

from mnemosyne.kernels.triton.cells import BASE, CHUNKS, LAYER, cell_field
from mnemosyne.kernels.triton.streams import Rotation

VERSIONS = ("3.6.", "3.7.")
"""Of triton that have Gluon as it is used here."""
ROWS, COLUMNS, DEPTH = 128, 128, 64
"""Of a tile, and of a step."""
SHARED = 226 * 1024
"""Bytes of shared memory for the ring and for what the two groups store."""
SPAN = 4
"""Tiles of a program, at most: more would leave multiprocessors without work at the end, or wait long for one
that another lane's memory holds."""
REGISTERS = (240, 24)
"""A thread of the second group, and of the warp that calls. The first group has what is left."""
HALF = gl.constexpr(32)
"""Numbers of a head that rotate against as many others; ``support.CELL_HEAD_DIMS`` has 64."""
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Its name from Triton 3.7 on, and before."""


@gluon.jit
def _at(p, columns, TILES: gl.constexpr):
    """Cell, tile of rows and tile of columns; a cell's rows fastest, so that those that share weights run
    together."""
    return p // TILES // columns, p % TILES, p // TILES % columns


@gluon.jit
def _call(rooms, work, a, weight, CELL: gl.constexpr, L: gl.constexpr, KIND: gl.constexpr):
    """Operands of the program's tiles, in their order, as soon as there is room."""
    a_room, b_room, full, free, order = rooms
    cells, count, N, K, tiles = work
    STAGES: gl.constexpr = a_room.shape[0]
    ROWS: gl.constexpr = a_room.shape[1]
    WIDTH: gl.constexpr = b_room.shape[1]
    DEPTH: gl.constexpr = b_room.shape[2]
    MADE: gl.constexpr = WIDTH // 2 if KIND == "swiglu" else WIDTH
    columns = (N + MADE - 1) // MADE
    turn = 0
    for p in range(gl.program_id(0), tiles, gl.num_programs(0)):
        cell, tile, column = _at(p, columns, CELL // ROWS)
        chunks = cell_field(cells, CHUNKS, cell, count).to(gl.int32)
        layer = cell_field(cells, LAYER, cell, count).to(gl.int32)
        if tile * ROWS < chunks * L:
            row = cell * CELL + tile * ROWS
            for k in range(0, K, DEPTH):
                s = turn % STAGES
                mbarrier.wait(free.index(s), turn // STAGES & 1 ^ 1)
                ready = full.index(s)
                mbarrier.expect(ready, (ROWS + WIDTH) * DEPTH * 2)
                tma.async_copy_global_to_shared(a, [row, k], ready, a_room.index(s))
                if KIND == "swiglu":
                    first = layer * 2 * N + column * MADE
                    to = b_room.index(s)
                    tma.async_copy_global_to_shared(weight, [first, k], ready, to.slice(0, MADE))
                    tma.async_copy_global_to_shared(weight, [first + N, k], ready, to.slice(MADE, MADE))
                else:
                    first = layer * N + column * MADE
                    tma.async_copy_global_to_shared(weight, [first, k], ready, b_room.index(s))
                turn += 1


@gluon.jit
def _rotated(x, cos, sin, base, live):
    """Heads of `[rows, columns]`, rounded as they would be stored, each by its token's angles."""
    ROWS: gl.constexpr = x.shape[0]
    HEADS: gl.constexpr = x.shape[1] // (2 * HALF)
    form: gl.constexpr = x.type.layout
    heads = gl.permute(gl.reshape(x, [ROWS, HEADS, 2, HALF]), (0, 1, 3, 2))
    first, second = gl.split(heads)
    by: gl.constexpr = gl.SliceLayout(1, first.type.layout)
    t = gl.arange(0, ROWS, gl.SliceLayout(1, by))[:, None]
    angle = (base + t) * HALF + gl.arange(0, HALF, gl.SliceLayout(0, by))[None, :]
    c = gl.expand_dims(gl.load(cos + angle, mask=t < live, other=0.0), 1)
    s = gl.expand_dims(gl.load(sin + angle, mask=t < live, other=0.0), 1)
    turned = gl.join(gl.fma(first, c, -(second * s)), gl.fma(second, c, first * s))
    return gl.convert_layout(gl.reshape(gl.permute(turned, (0, 1, 3, 2)), x.shape), form)


@gluon.jit
def _make(
    rooms,
    work,
    ends,
    WHICH: gl.constexpr,
    CELL: gl.constexpr,
    L: gl.constexpr,
    KIND: gl.constexpr,
    ROTATES: gl.constexpr,
):
    """Every second tile of the program that has rows, from its WHICH-th on."""
    a_room, b_room, full, free, order = rooms
    cells, count, N, K, tiles = work
    out, out_room, residual, cos, sin, rotated_first, rotated_end = ends
    STAGES: gl.constexpr = a_room.shape[0]
    ROWS: gl.constexpr = a_room.shape[1]
    WIDTH: gl.constexpr = b_room.shape[1]
    DEPTH: gl.constexpr = b_room.shape[2]
    MADE: gl.constexpr = WIDTH // 2 if KIND == "swiglu" else WIDTH
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    columns = (N + MADE - 1) // MADE
    steps = K // DEPTH
    taken = 0
    for p in range(gl.program_id(0), tiles, gl.num_programs(0)):
        cell, tile, column = _at(p, columns, CELL // ROWS)
        row = tile * ROWS
        live = cell_field(cells, CHUNKS, cell, count).to(gl.int32) * L - row
        if live > 0:
            if taken % 2 == WHICH:
                acc = gl.full([ROWS, WIDTH], 0.0, gl.float32, SUMS)
                # A group that waited for operands two rounds of the ring ahead would take others for them.
                mbarrier.wait(order, taken & 1 ^ 1)
                turn = taken * steps
                for _ in range(steps):
                    s = turn % STAGES
                    mbarrier.wait(full.index(s), turn // STAGES & 1)
                    right = b_room.index(s).permute((1, 0))
                    acc = warpgroup_mma(a_room.index(s), right, acc, is_async=True)
                    # The step before has read its operands, in every warp of the group.
                    acc = warpgroup_mma_wait(1, deps=[acc])
                    barrier()
                    mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), pred=turn > taken * steps)
                    turn += 1
                mbarrier.arrive(order)
                acc = warpgroup_mma_wait(0, deps=[acc])
                barrier()
                mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES))

                base = cell_field(cells, BASE, cell, count) + row
                if KIND == "add":
                    t = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))[:, None]
                    c = column * MADE + gl.arange(0, WIDTH, gl.SliceLayout(0, SUMS))[None, :]
                    here = t < live
                    at = residual + (base + t) * N + c
                    gl.store(at, gl.load(at, mask=here) + acc, mask=here)
                else:
                    room = out_room.index(WHICH)
                    # What was stored from there last has been read.
                    tma.store_wait(0)
                    barrier()
                    if KIND == "swiglu":
                        halves = gl.permute(gl.reshape(acc, [ROWS, 2, MADE]), (0, 2, 1))
                        value, gate = gl.split(halves)
                        room.store((value * gate / (1.0 + gl.exp(-gate))).to(out.dtype))
                    else:
                        made = acc.to(out.dtype)
                        if ROTATES and column * MADE >= rotated_first and column * MADE < rotated_end:
                            made = _rotated(made.to(gl.float32), cos, sin, base, live).to(out.dtype)
                        room.store(made)
                    fence_async_shared()
                    barrier()
                    tma.async_copy_shared_to_global(out, [cell * CELL + row, column * MADE], room)
            taken += 1
    if KIND != "add":
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["count", "tiles"])
def whole_kernel(
    a,
    weight,
    out,
    residual,
    cos,
    sin,
    cells,
    count,
    N,
    K,
    tiles,
    rotated_first,
    rotated_end,
    CELL: gl.constexpr,
    L: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    KIND: gl.constexpr,
    ROTATES: gl.constexpr,
):
    """``a``, ``weight`` and ``out`` by descriptors of one tile ("swiglu": of half a tile's columns); the rest
    as in ``gemm.gemm_kernel``."""
    ROWS: gl.constexpr = a.block_shape[0]
    DEPTH: gl.constexpr = a.block_shape[1]
    WIDTH: gl.constexpr = weight.block_shape[0] * (2 if KIND == "swiglu" else 1)
    a_room = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, DEPTH], a.layout)
    b_room = gl.allocate_shared_memory(weight.dtype, [STAGES, WIDTH, DEPTH], weight.layout)
    out_room = gl.allocate_shared_memory(out.dtype, [2] + out.block_shape, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(order.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    rooms = (a_room, b_room, full, free, order.index(0))
    work = (cells, count, N, K, tiles)
    ends = (out, out_room, residual, cos, sin, rotated_first, rotated_end)
    gl.warp_specialize(
        [
            (_make, (rooms, work, ends, 0, CELL, L, KIND, ROTATES)),
            (_make, (rooms, work, ends, 1, CELL, L, KIND, ROTATES)),
            (_call, (rooms, work, a, weight, CELL, L, KIND)),
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


def serves(a: Tensor, columns: int, cell: int, rotation: Rotation | None) -> bool:
    """Whether this kernel has the shapes of a product, ``columns`` results a row, and the device what it
    takes."""
    fits = cell % ROWS == 0 and columns % COLUMNS == 0 and a.shape[1] % DEPTH == 0
    if rotation is not None:
        half = rotation.cos.shape[1]
        fits = fits and half == HALF.value and rotation.column % COLUMNS == 0
        fits = fits and rotation.heads * 2 * half % COLUMNS == 0
    return fits and a.dtype == torch.bfloat16 and _multiprocessors(a.device) > 0


def gemm(
    a: Tensor,
    weight: Tensor,
    cells: Tensor,
    cell: int,
    length: int,
    out: Tensor,
    kind: str = "store",
    rotation: Rotation | None = None,
) -> None:
    """As ``gemm.gemm``, and columns of ``rotation`` rotated. Rows of ``out`` in a tile that some of a cell's
    tokens reach are all overwritten."""
    layers, rows, K = weight.shape
    first, heads, cos, sin = rotation or Rotation(0, 0, out, out)
    made = COLUMNS // 2 if kind == "swiglu" else COLUMNS
    N = rows // 2 if kind == "swiglu" else rows
    operand = gl.NVMMASharedLayout(128, 16, 2)
    tiles = cells.shape[1] * (cell // ROWS) * triton.cdiv(N, made)
    # What is added to isn't bf16, and has no descriptor; the product's own operand stands in for it.
    target = a if kind == "add" else out
    stored = 0 if kind == "add" else 2 * ROWS * made * 2
    programs = max(triton.cdiv(tiles, SPAN), min(tiles, _multiprocessors(a.device)))
    whole_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, [ROWS, DEPTH], operand),
        TensorDescriptor.from_tensor(weight.view(layers * rows, K), [made, DEPTH], operand),
        TensorDescriptor.from_tensor(target, [ROWS, made], operand),
        out,
        cos,
        sin,
        cells,
        cells.shape[1],
        N,
        K,
        tiles,
        first,
        first + heads * 2 * HALF.value,
        CELL=cell,
        L=length,
        STAGES=(SHARED - stored) // ((ROWS + COLUMNS) * DEPTH * 2),
        REGISTERS=REGISTERS,
        KIND=kind,
        ROTATES=rotation is not None,
        num_warps=4,
    )
