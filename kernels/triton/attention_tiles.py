"""Which tiles a program of ``attention_shared`` has, which keys and values they see, and the warp that calls
those to shared memory. Knows no score.

A tile is two chunks of one head. Programs take tiles in pairs, a late one and an early one, so that all have
as much to do.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, PLACE, STATE, cell_field, located

GROUPS = gl.constexpr(2)
"""Chunks of a tile."""
D = gl.constexpr(64)
L = gl.constexpr(64)
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))
"""Of one warp."""
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Its name from Triton 3.7 on, and before."""


@gluon.jit
def turns(units):
    """Tiles of a program, those left out too."""
    return 2 * ((units - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0))


@gluon.jit
def tile_of(n, tiles, HEADS: gl.constexpr):
    """Cell, head and tile that are a program's n-th, and whether it wasn't the one before already."""
    pairs = (tiles + 1) // 2
    unit = gl.program_id(0) + n // 2 * gl.num_programs(0)
    early = unit % pairs
    late = tiles - 1 - early
    item = unit // pairs
    second = n % 2
    return item // HEADS, item % HEADS, late + second * (early - late), (second == 0) | (early != late)


@gluon.jit
def first_seen(place, chunk, HELD: gl.constexpr, SEGMENT: gl.constexpr):
    """The first chunk that a chunk sees, counted from the cell's first."""
    if SEGMENT:
        return -(place % HELD // L).to(gl.int32)
    else:
        return gl.maximum(chunk - HELD // L, -(gl.minimum(place, HELD) // L).to(gl.int32))


@gluon.jit
def _copy(address, offset, room):
    """A chunk's rows `[L, D]`, which lie ``offset`` elements behind an address, one after the other."""
    row = gl.arange(0, L, gl.SliceLayout(1, COPY))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(room, address + offset + row[:, None] * D + d[None, :])


@gluon.jit
def call(
    rooms,
    work,
    rows,
    of_state,
    P: gl.constexpr,
    HEADS: gl.constexpr,
    HELD: gl.constexpr,
    SEGMENT: gl.constexpr,
):
    """Queries, keys and values of the program's tiles, in their order, as soon as there is room."""
    q_room, k_room, v_room, q_full, q_free, full, free = rooms
    cells, count, CELL, tiles, units = work
    x, h, persistent_k, persistent_v, column = rows
    STAGES: gl.constexpr = k_room.shape[0]
    KEYS: gl.constexpr = k_room.shape[1]
    DIM: gl.constexpr = HEADS * D
    KIND: gl.constexpr = x.dtype
    turn = 0
    taken = 0
    for n in range(turns(units)):
        cell, head, tile, fresh = tile_of(n, tiles, HEADS)
        chunks = cell_field(cells, CHUNKS, cell, count).to(gl.int32)
        if fresh and tile * GROUPS < chunks:
            layer = cell_field(cells, LAYER, cell, count)
            place = cell_field(cells, PLACE, cell, count)
            first = first_seen(place, tile * GROUPS, HELD, SEGMENT)
            end = gl.minimum((tile + 1) * GROUPS, chunks)
            own = cell * CELL
            at = column + head * D

            q = taken % 2
            mbarrier.wait(q_free.index(q), taken // 2 & 1 ^ 1)
            ready = q_full.index(q)
            mbarrier.expect(ready, GROUPS * L * D * 2)
            for g in gl.static_range(GROUPS):
                to = q_room.index(q).slice(g * L, L)
                tma.async_copy_global_to_shared(x, [own + (tile * GROUPS + g) * L, at], ready, to)
            taken += 1

            of_head = ((layer * HEADS + head) * P).to(gl.int32)
            for p in range(0, P, KEYS):
                s = turn % STAGES
                mbarrier.wait(free.index(s), turn // STAGES & 1 ^ 1)
                ready = full.index(s)
                mbarrier.expect(ready, 2 * KEYS * D * 2)
                for i in gl.static_range(KEYS // L):
                    from_row = of_head + p + i * L
                    k_to = k_room.index(s).slice(i * L, L)
                    v_to = v_room.index(s).slice(i * L, L)
                    tma.async_copy_global_to_shared(persistent_k, [from_row, 0], ready, k_to)
                    tma.async_copy_global_to_shared(persistent_v, [from_row, 0], ready, v_to)
                turn += 1

            # What the state holds has no descriptor: a session's lies wherever it was allocated.
            held_end = gl.minimum(end, 0)
            if first < held_end:
                state = cell_field(cells, STATE, cell, count)
                held = head.to(gl.int64) * (HELD * D * 2)
                keys_offset, keys_stride, values_offset, values_stride = of_state[:4]
                held_k = located(state, keys_offset + layer * keys_stride + held, KIND)
                held_v = located(state, values_offset + layer * values_stride + held, KIND)
                keys_offset, keys_stride, values_offset, values_stride = of_state[4:]
                held_hk = located(state, keys_offset + layer * keys_stride + held, KIND)
                held_hv = located(state, values_offset + layer * values_stride + held, KIND)
                for j in range(first, held_end):
                    s = turn % STAGES
                    mbarrier.wait(free.index(s), turn // STAGES & 1 ^ 1)
                    k_to = k_room.index(s)
                    v_to = v_room.index(s)
                    if SEGMENT:
                        row = (j - first) * (L * D)
                        _copy(held_hk, row, k_to.slice(0, L))
                        _copy(held_hv, row, v_to.slice(0, L))
                        _copy(held_k, row, k_to.slice(L, L))
                        _copy(held_v, row, v_to.slice(L, L))
                    else:
                        row = (HELD // L + j) * (L * D)
                        _copy(held_k, row, k_to)
                        _copy(held_v, row, v_to)
                    async_copy.commit_group()
                    # The step before has come.
                    async_copy.wait_group(1)
                    fence_async_shared()
                    barrier()
                    mbarrier.arrive(full.index((turn + STAGES - 1) % STAGES), pred=j > first)
                    turn += 1
                async_copy.wait_group(0)
                fence_async_shared()
                barrier()
                mbarrier.arrive(full.index((turn + STAGES - 1) % STAGES))

            for j in range(gl.maximum(first, 0), end):
                s = turn % STAGES
                mbarrier.wait(free.index(s), turn // STAGES & 1 ^ 1)
                ready = full.index(s)
                mbarrier.expect(ready, 2 * KEYS * D * 2)
                k_to = k_room.index(s)
                v_to = v_room.index(s)
                row = own + j * L
                if SEGMENT:
                    at_h = head * D
                    tma.async_copy_global_to_shared(h, [row, at_h], ready, k_to.slice(0, L))
                    tma.async_copy_global_to_shared(h, [row, at_h + DIM], ready, v_to.slice(0, L))
                    tma.async_copy_global_to_shared(x, [row, at + DIM], ready, k_to.slice(L, L))
                    tma.async_copy_global_to_shared(x, [row, at + 2 * DIM], ready, v_to.slice(L, L))
                else:
                    tma.async_copy_global_to_shared(x, [row, at + DIM], ready, k_to)
                    tma.async_copy_global_to_shared(x, [row, at + 2 * DIM], ready, v_to)
                turn += 1
