"""The table that tells kernels what they work on: one column a cell, int64, on the device.

A cell is a run of one session's chunks in one layer. A launch takes any number of cells that don't wait for
one another; what a program needs to know of its cell it finds here, so that a captured graph serves every
session, position and layer. A session's tensors lie in one allocation, and the table has its address. Knows
no tensor by name.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = ("layer", "chunks", "base", "state", "place", "open", "tokens")
"""``layer``: whose weights. ``chunks``: how many count; 0: the cell is empty and no program touches it.
``base``: the row of its first token in what is laid out by token (residual stream, rotary angles, traces by
chunk). ``state``: address of the session's state. ``place``: absolute position of its first token. ``open``:
address of the session's open chunk, where there is one. ``tokens``: how many of its tokens count."""

LAYER: tl.constexpr = tl.constexpr(0)
CHUNKS: tl.constexpr = tl.constexpr(1)
BASE: tl.constexpr = tl.constexpr(2)
STATE: tl.constexpr = tl.constexpr(3)
PLACE: tl.constexpr = tl.constexpr(4)
OPEN: tl.constexpr = tl.constexpr(5)
TOKENS: tl.constexpr = tl.constexpr(6)


@triton.jit
def cell_field(cells, FIELD: tl.constexpr, cell, count):
    """One number of a cell; ``count`` is the table's width."""
    return tl.load(cells + FIELD * count + cell)


@triton.jit
def located(address, offset, like: tl.constexpr):
    """``offset`` bytes behind an address, as a pointer to elements of type ``like``. Both are multiples of
    16, which the compiler is told, so that it loads 16 bytes at once."""
    return tl.multiple_of((address + offset).to(tl.pointer_type(like)), 16)
