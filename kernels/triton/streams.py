"""What gives a cell's rows their place: rotary positions, and the causal convolution that makes queries, keys
and values of the memory. Counterpart of ``kernels.positions`` and of ``features`` in ``engine.memory``."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import BASE, CHUNKS, LAYER, OPEN, STATE, TOKENS, cell_field, located
from mnemosyne.kernels.triton.network import NORM_EPSILON


@triton.jit(do_not_specialize=["count"])
def rotate_kernel(
    x,
    cos,
    sin,
    cells,
    count,
    N,
    column,
    D: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
):
    """Programs are (cell, chunk, head)."""
    cell = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if chunk >= cell_field(cells, CHUNKS, cell, count):
        return
    HALF: tl.constexpr = D // 2
    t = chunk * L + tl.arange(0, L)
    half = tl.arange(0, HALF)
    angle = (cell_field(cells, BASE, cell, count) + t)[:, None] * HALF + half[None, :]
    c = tl.load(cos + angle)
    s = tl.load(sin + angle)
    at = x + (cell * CELL + t)[:, None] * N + column + tl.program_id(2) * D + half[None, :]
    first = tl.load(at).to(tl.float32)
    second = tl.load(at + HALF).to(tl.float32)
    # Which product is rounded is said here, and not left to the compiler.
    tl.store(at, tl.fma(first, c, -(second * s)))
    tl.store(at + HALF, tl.fma(second, c, first * s))


def rotate(
    x: Tensor, column: int, heads: int, cos: Tensor, sin: Tensor, cells: Tensor, cell: int, length: int
) -> None:
    """Rotate ``heads`` heads from ``column`` on of ``x`` `[cells cell, N]`, in place; ``cos`` and ``sin``
    `[tokens, head_dim / 2]`, fp32."""
    half = cos.shape[1]
    rotate_kernel[(cells.shape[1], cell // length, heads)](
        x, cos, sin, cells, cells.shape[1], x.shape[1], column, D=2 * half, CELL=cell, L=length, num_warps=4
    )


@triton.jit(do_not_specialize=["count"])
def convolve_kernel(
    x,
    out,
    weight,
    cells,
    count,
    N,
    column,
    channel,
    tail_offset,
    tail_stride,
    OUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Programs are (cell, chunk, head of a stream); the first KEYS of the heads are queries or keys."""
    cell = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if chunk >= cell_field(cells, CHUNKS, cell, count):
        return
    head = tl.program_id(2)
    layer = cell_field(cells, LAYER, cell, count)
    tails = located(
        cell_field(cells, STATE, cell, count), tail_offset + layer * tail_stride, x.dtype.element_ty
    )
    d = tl.arange(0, D)
    t = chunk * L + tl.arange(0, L)
    taps = weight + layer * K * CHANNELS + channel + head * D + d
    mixed = tl.zeros([L, D], tl.float32)
    for i in tl.static_range(K):
        row = t + (i - K + 1)
        own = tl.load(
            x + (cell * CELL + row)[:, None] * N + column + head * D + d[None, :],
            mask=(row >= 0)[:, None],
            other=0.0,
        )
        before = tl.load(
            tails + (row + K - 1)[:, None] * CHANNELS + channel + head * D + d[None, :],
            mask=(row < 0)[:, None],
            other=0.0,
        )
        mixed += (own.to(tl.float32) + before.to(tl.float32)) * tl.load(taps + i * CHANNELS)[None, :]
    mixed = mixed / (1.0 + tl.exp(-mixed))
    if head < KEYS:
        mixed *= (1.0 / tl.sqrt(tl.sum(mixed * mixed, 1) + NORM_EPSILON))[:, None]
    tl.store(out + (cell * CELL + t)[:, None] * OUT + head * D + d[None, :], mixed)


def convolve(
    x: Tensor,
    column: int,
    out: Tensor,
    weight: Tensor,
    channel: int,
    keys: int,
    tails: tuple[int, int],
    cells: Tensor,
    cell: int,
    length: int,
    head_dim: int,
) -> None:
    """Streams from ``column`` of ``x`` `[cells cell, N]` on, convolved after their tails, SiLU, the first
    ``keys`` heads to unit norm, to ``out`` `[cells cell, streams dim]`.

    ``weight`` `[layers, K, S dim]`, of which the streams' channels begin at ``channel``; ``tails`` offset and
    layer stride, in bytes, of the rows before the cell in the session's state, `[layers, K - 1, S dim]`.
    """
    convolve_kernel[(cells.shape[1], cell // length, out.shape[1] // head_dim)](
        x,
        out,
        weight,
        cells,
        cells.shape[1],
        x.shape[1],
        column,
        channel,
        *tails,
        OUT=out.shape[1],
        CHANNELS=weight.shape[2],
        K=weight.shape[1],
        D=head_dim,
        CELL=cell,
        L=length,
        KEYS=keys,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["count"])
def tail_kernel(
    x,
    cells,
    count,
    N,
    column,
    channel,
    tail_offset,
    tail_stride,
    kept_offset,
    kept_stride,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    OPENED: tl.constexpr,
):
    """Programs are (cell, block of WIDTH channels)."""
    cell = tl.program_id(0).to(tl.int64)
    chunks = cell_field(cells, CHUNKS, cell, count)
    if chunks == 0:
        return
    KIND: tl.constexpr = x.dtype.element_ty
    layer = cell_field(cells, LAYER, cell, count)
    state = cell_field(cells, STATE, cell, count)
    before = located(state, tail_offset + layer * tail_stride, KIND)
    owner = cell_field(cells, OPEN, cell, count) if OPENED else state
    kept = located(owner, kept_offset + layer * kept_stride, KIND)
    tokens = tl.minimum(chunks * L, cell_field(cells, TOKENS, cell, count))
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    for i in tl.static_range(K - 1):
        row = tokens - (K - 1) + i
        own = tl.load(x + (cell * CELL + row) * N + column + c, mask=(c >= 0) & (row >= 0), other=0.0)
        older = tl.load(before + (row + K - 1) * CHANNELS + channel + c, mask=(c >= 0) & (row < 0), other=0.0)
        tl.store(kept + i * CHANNELS + channel + c, tl.where(row >= 0, own, older))


def keep_tails(
    parts: Sequence[tuple[Tensor, int, int, int]],
    channels: int,
    taps: int,
    tails: tuple[int, int],
    opened: tuple[int, int] | None,
    cells: Tensor,
    cell: int,
    length: int,
    head_dim: int,
) -> None:
    """The last K - 1 rows before each cell's next token, from the cell or, where it has fewer tokens, from
    the state's ``tails``: there they go, or to ``opened`` of the open chunk.

    ``parts``: a stream buffer, the column its streams begin at, their channel in the tails and how many;
    ``channels`` of a tail's row, ``taps`` K."""
    for x, column, channel, width in parts:
        tail_kernel[(cells.shape[1], width // head_dim)](
            x,
            cells,
            cells.shape[1],
            x.shape[1],
            column,
            channel,
            *tails,
            *(opened or tails),
            CHANNELS=channels,
            WIDTH=head_dim,
            K=taps,
            CELL=cell,
            L=length,
            OPENED=opened is not None,
            num_warps=1,
        )
