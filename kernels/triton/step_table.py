"""The table that tells the kernels of decode what they work on: one column a session, int64, on the device.

A step takes one token of every session through all layers, so unlike a cell (``cells``) a column has no
layer: a launch is of one, and its arguments say where that layer's tensors lie behind a session's addresses.
Knows no tensor by name.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mnemosyne.kernels.triton.cells import located

FIELDS = ("state", "open", "index", "position", "token")
"""``state``: address of the session's committed state. ``open``: address of its open chunk; 0: the column is
empty and no program touches anything for it. ``index``: the token's place in its chunk. ``position``:
absolute position of the chunk's first token. ``token``: its id."""

STATE: tl.constexpr = tl.constexpr(0)
OPEN: tl.constexpr = tl.constexpr(1)
INDEX: tl.constexpr = tl.constexpr(2)
POSITION: tl.constexpr = tl.constexpr(3)

ON_DEVICE: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)


class Streams(NamedTuple):
    """Where the convolution's input lies, in elements: the column of each stream in the rows that are given,
    and its channel in the tails; queries, keys, values."""

    columns: tuple[int, ...]
    channels: tuple[int, ...]


@triton.jit
def open_up():
    """The launch after this one may come from here on, as far as there is room for its programs."""
    if ON_DEVICE:
        gdc_launch_dependents()


@triton.jit
def begin():
    """Every kernel of a step is launched while the one before it still runs (``launch_pdl``), which takes its
    start out of the way. Nothing that launches before it in the step change is touched before this, by no
    program: then that one has ended, and with it all before it. The table, the weights, what is committed and
    what earlier steps left may be read earlier."""
    if ON_DEVICE:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def step_field(table, FIELD: tl.constexpr, row, count):
    """One number of a session; ``count`` is the table's width."""
    return tl.load(table + FIELD * count + row)


@triton.jit
def tails_of(table, row, count, state_offset, open_offset, like: tl.constexpr):
    """The streams' rows before the token: the open chunk has them, but at its first token the state."""
    fresh = step_field(table, INDEX, row, count) == 0
    state = step_field(table, STATE, row, count) + state_offset
    own = step_field(table, OPEN, row, count) + open_offset
    return located(tl.where(fresh, state, own), 0, like)


@triton.jit
def convolved(x, tails, taps, CHANNELS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, KEY: tl.constexpr):
    """One head of a stream after its tail, SiLU, to unit norm where KEY; `[D]` fp32. ``taps`` `[K, CHANNELS]`
    and ``tails`` `[K - 1, CHANNELS]` point to the head's first channel, ``x`` to its new row."""
    d = tl.arange(0, D)
    mixed = tl.load(x + d).to(tl.float32) * tl.load(taps + (K - 1) * CHANNELS + d)
    for i in tl.static_range(K - 1):
        mixed += tl.load(tails + i * CHANNELS + d).to(tl.float32) * tl.load(taps + i * CHANNELS + d)
    mixed = mixed / (1.0 + tl.exp(-mixed))
    if KEY:
        mixed *= 1.0 / tl.sqrt(tl.sum(mixed * mixed, 0) + 1e-6)
    return mixed


@triton.jit
def shift(x, tails, kept, CHANNELS: tl.constexpr, K: tl.constexpr, D: tl.constexpr):
    """The tails after the token: one row on, the token's own the last. ``kept`` may be ``tails``: each thread
    reads a row's element before it overwrites it."""
    d = tl.arange(0, D)
    for i in tl.static_range(K - 1):
        tl.store(kept + i * CHANNELS + d, tl.load(tails + (i + 1) * CHANNELS + d if i + 2 < K else x + d))
