"""``learn`` with the memory on the chip from a cell's first chunk to its last: M in registers, S in shared
memory; what lies in the state is read once and written once a cell, and no room is needed.

Beside ``learn`` because the chip holds the memory of one shape alone, and no cache of an open chunk besides
(``serves``). ``learn`` chooses by shapes, device and whether the memory moves, never by load: a chunk is
committed by this kernel in a wave of single chunks as in one of whole cells, and an open chunk is always
filled by that one. The two add up in different orders; no bit of one is promised to be the other's.

All chunks of a launch are shared out evenly among as many programs as the device runs at once
(``learn_shares``); cells with room for one chunk are a program each, which starts sooner. ``learn_part``
takes a cell's chunks through its memory. Where a cell is cut changes no bit: its state goes from one program
to the next as from one launch to the next. Written in Gluon, Triton's language with layouts: what of a
product a thread has decides where everything lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.kernels.triton.cell_gates import VECTORS, CellDecays
from mnemosyne.kernels.triton.cells import CHUNKS, cell_field
from mnemosyne.kernels.triton.learn_part import learn_part
from mnemosyne.kernels.triton.learn_shares import (
    await_part,
    columns_seen,
    hand_part,
    programs,
    share,
    whose,
)
from mnemosyne.kernels.triton.learn_steps import D, H, L

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
    handed,
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
    CELLS: gl.constexpr,
):
    """Programs are shares of all chunks (``learn_shares``); of cells with room for one chunk they are (cell,
    head)."""
    program = gl.program_id(0)
    if CELL == L:
        first_chunk = program
        past_chunk = program + cell_field(cells, CHUNKS, program // HEADS, count).to(gl.int32)
    else:
        first_chunk, past_chunk = share(cells, count, program, gl.num_programs(0), HEADS, CELLS)
    while past_chunk > first_chunk:
        if CELL == L:
            cell, head, begin = (program // HEADS).to(gl.int64), program % HEADS, program
        else:
            cell, head, begin = whose(cells, count, past_chunk - 1, HEADS, CELLS)
        chunks = cell_field(cells, CHUNKS, cell, count).to(gl.int32)
        since = gl.maximum(first_chunk - begin, 0)
        until = past_chunk - begin
        if CELL > L and since > 0:
            await_part(handed + program - 1)
        learn_part(
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
            K_COLUMN,
            Q_COLUMN,
            V_COLUMN,
            HEADS,
            CELL,
            VECTORS,
            EVERY,
            RESIDUAL,
            NORM,
            CLIP,
        )
        if CELL > L and until < chunks:
            hand_part(handed + program)
        past_chunk = begin + since


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
    if cell == L.value:
        many, handed = heads * cells.shape[1], None
    else:
        many = programs(streams.device)
        handed = torch.zeros(many, dtype=torch.int32, device=streams.device)
    resident_kernel[(many,)](
        streams,
        gates,
        decays.vectors,
        decays.G,
        norm,
        out,
        trace,
        norms,
        cells,
        handed,
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
        CELLS=columns_seen(cells.shape[1]),
        num_warps=WARPS,
    )
