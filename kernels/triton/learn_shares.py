"""Which chunks of a launch's cells a program of ``learn_resident`` takes: all chunks of all (cell, head) in a
row, cut in pieces of equal length, so that no multiprocessor idles while another works on a last cell.

A piece is at least as long as the longest cell: a cut cell lies in two programs. Each goes through its piece
from the end, so the earlier chunks of a cut cell come first of all in the one program, and the later chunks
last of all in the next, which rarely has to wait. A program waits for one of a lower number alone, which the
device starts earlier: nothing hangs however few run at once.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mnemosyne.kernels.triton.cells import CHUNKS
from mnemosyne.kernels.triton.learn_steps import barrier

EACH = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))


@cache
def programs(device: torch.device) -> int:
    """One for each multiprocessor: no more fit."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def columns_seen(count: int) -> int:
    """Columns of the table of cells that a program looks at: a power of two, so that few are compiled."""
    return max(256, 1 << (count - 1).bit_length())


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _chunks(cells, count, CELLS: gl.constexpr):
    i = gl.arange(0, CELLS, EACH)
    return gl.load(cells + CHUNKS * count + i, mask=i < count, other=0).to(gl.int32)


@gluon.jit
def share(cells, count, program, programs, HEADS: gl.constexpr, CELLS: gl.constexpr):
    """The first chunk of a program's piece, and the one past its last."""
    chunks = _chunks(cells, count, CELLS)
    total = gl.sum(chunks, 0) * HEADS
    piece = gl.maximum((total + programs - 1) // programs, gl.max(chunks, 0))
    first = program * piece
    return first, gl.minimum(first + piece, total)


@gluon.jit
def whose(cells, count, chunk, HEADS: gl.constexpr, CELLS: gl.constexpr):
    """The cell and head of a chunk, and the first chunk of theirs."""
    chunks = _chunks(cells, count, CELLS)
    passed = gl.associative_scan(chunks, 0, _add) * HEADS <= chunk
    cell = gl.sum(passed.to(gl.int32), 0)
    begin = gl.sum(gl.where(passed, chunks, 0), 0) * HEADS
    own = gl.load(cells + CHUNKS * count + cell).to(gl.int32)
    head = (chunk - begin) // own
    return cell.to(gl.int64), head, begin + head * own


@gluon.jit
def hand_part(flag):
    """What this program stored is there for the next."""
    barrier()
    gl.atomic_xchg(flag, 1, sem="release", scope="gpu")


@gluon.jit
def await_part(flag):
    """Until the program before has stored its part."""
    while gl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
        pass
    barrier()
