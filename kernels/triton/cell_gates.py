"""Gates of a cell's tokens, and the decays of its chunks that are made of them. Counterpart of
``kernels.gates`` and of ``gates`` in ``engine.memory``, for the Titans rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, TOKENS, cell_field
from mnemosyne.kernels.triton.support import PRECISIONS

W: tl.constexpr = tl.constexpr(0)
S: tl.constexpr = tl.constexpr(1)
A: tl.constexpr = tl.constexpr(2)
F: tl.constexpr = tl.constexpr(3)
E: tl.constexpr = tl.constexpr(4)
CARRIED: tl.constexpr = tl.constexpr(5)
FORGOT: tl.constexpr = tl.constexpr(6)
THETA: tl.constexpr = tl.constexpr(7)
VECTORS = 8
"""Per token: w, s (its weights in M and S at the chunk's end), A, F, E after it, sums of logs of eta and of
1 - alpha up to it, theta."""


TILE = 128
"""Tokens of a program that makes logits, in a cell of as many."""
WARPS, TOGETHER = 4, 8
"""Of a program that makes decays: as many gates of a chunk, each of whose scans runs within a warp."""


class CellDecays(NamedTuple):
    vectors: Tensor
    """fp32 `[cells, chunks, H, depth, VECTORS, L]`."""
    G: Tensor
    """`[cells, chunks, H, depth, L, L]` in the operands' precision: weight of token j in M after token t."""


@triton.jit(do_not_specialize=["count"])
def logits_kernel(
    u,
    weight,
    bias,
    out,
    cells,
    count,
    K,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs are (cell, tile of ROWS tokens, tile of COLUMNS gates)."""
    cell = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    if first >= cell_field(cells, CHUNKS, cell, count) * L:
        return
    layer = cell_field(cells, LAYER, cell, count)
    row = cell * CELL + first + tl.arange(0, ROWS)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    kk = tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, K, DEPTH):
        x = tl.load(u + row[:, None] * K + k + kk[None, :])
        for part in tl.static_range(PARTS):
            at = ((layer * PARTS + part) * N + c[None, :]) * K + k + kk[:, None]
            acc = tl.dot(x, tl.load(weight + at), acc, input_precision=PRECISION)
    acc += tl.load(bias + layer * N + c)[None, :]
    # A gate's tokens side by side, as decays take them.
    t = first + tl.arange(0, ROWS)
    tl.store(out + (cell * N + c[:, None]) * CELL + t[None, :], tl.trans(acc))


def gate_logits(
    u: Tensor, weight: Tensor, bias: Tensor, out: Tensor, cells: Tensor, cell: int, length: int
) -> None:
    """Of rows ``u`` `[cells cell, K]`, by ``weight`` `[layers, parts, N, K]`, whose parts add up, and
    ``bias`` `[layers, N]`: fp32 `[cells, N, cell]`, of all rows of a tile that some tokens reach."""
    _, parts, N, K = weight.shape
    rows = min(cell, TILE)
    logits_kernel[(cells.shape[1], cell // rows, N // 64)](
        u,
        weight,
        bias,
        out,
        cells,
        cells.shape[1],
        K,
        N=N,
        PARTS=parts,
        COLUMNS=64,
        DEPTH=64 if u.dtype == torch.bfloat16 else 16,
        CELL=cell,
        L=length,
        ROWS=rows,
        PRECISION=PRECISIONS[u.dtype],
        num_warps=8 if rows > 64 else 4,
        num_stages=1 if u.dtype != torch.bfloat16 else 3 if rows > 64 else 4,
    )


@triton.jit
def gate(z, top, epsilon):
    """top * relu(sigmoid(z) - eps) / (1 - eps)."""
    return tl.maximum(1.0 / (1.0 + tl.exp(-z)) - epsilon, 0.0) * (top / (1.0 - epsilon))


@triton.jit
def _after(a, b, c, d):
    """x -> a x + b, then x -> c x + d."""
    return a * c, b * c + d


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def _summed_logs(factor):
    """Base 2, along a row. A factor of 0 leaves of what is before it nothing that fp32 has."""
    return tl.cumsum(tl.where(factor > 0.0, tl.log2(factor), tl.where(factor <= 0.0, -256.0, factor)), 1)


@triton.jit
def _between(logs, L: tl.constexpr):
    """Products over (j, t] `[t, j]`, of ``_summed_logs``."""
    t, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    # Loaded as wide as the result, so that a thread has neighbours of it, which it stores together.
    upto = tl.load(logs + t) - tl.load(tl.broadcast_to(logs + j, [L, L]))
    return tl.where(t >= j, tl.exp2(upto), 0.0)


@triton.jit(do_not_specialize=["count"])
def decays_kernel(
    logits,
    vectors,
    G,
    cells,
    count,
    theta_max,
    eta_max,
    alpha_max,
    epsilon,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    VECTORS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs are (cell, chunk, TOGETHER of the heads' memory layers)."""
    cell = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if chunk >= cell_field(cells, CHUNKS, cell, count):
        return
    GATES: tl.constexpr = HEADS * LAYERS
    first = tl.program_id(2) * TOGETHER
    gated = (first + tl.arange(0, TOGETHER))[:, None]
    t = tl.arange(0, L)[None, :]
    # What the chunk's end takes is what the last counted token has.
    last = tl.minimum(cell_field(cells, TOKENS, cell, count) - chunk * L, L) - 1
    here = (gated < GATES) & (t >= 0)
    later = here & (t < last)
    z = logits + (cell * N + gated) * CELL + chunk * L + t
    theta = gate(tl.load(z, mask=here, other=0.0), theta_max, epsilon)
    eta = gate(tl.load(z + GATES * CELL, mask=here, other=0.0), eta_max, epsilon)
    keep = 1.0 - gate(tl.load(z + 2 * GATES * CELL, mask=here, other=0.0), alpha_max, epsilon)
    # Of the token after each, up to the last.
    next_eta = gate(tl.load(z + GATES * CELL + 1, mask=later, other=0.0), eta_max, epsilon)
    next_keep = 1.0 - gate(tl.load(z + 2 * GATES * CELL + 1, mask=later, other=0.0), alpha_max, epsilon)
    next_eta = tl.where(t < last, next_eta, 1.0)
    next_keep = tl.where(t < last, next_keep, 1.0)

    place = (cell * (CELL // L) + chunk) * GATES
    at = vectors + (place + gated) * (VECTORS * L) + t
    tl.store(at + THETA * L, theta, mask=here)
    s = tl.where(t <= last, tl.associative_scan(next_eta, 1, _times, reverse=True), 0.0)
    tl.store(at + S * L, s * theta, mask=here)
    kept = tl.where(t <= last, tl.associative_scan(next_keep, 1, _times, reverse=True), 0.0)
    _, w = tl.associative_scan((next_eta, kept), 1, _after, reverse=True)
    tl.store(at + W * L, w * theta, mask=here)
    carried, left = _summed_logs(eta), tl.associative_scan(eta, 1, _times)
    forgot, whole = _summed_logs(keep), tl.associative_scan(keep, 1, _times)
    _, f = tl.associative_scan((keep, left), 1, _after)
    tl.store(at + E * L, left, mask=here)
    tl.store(at + A * L, whole, mask=here)
    tl.store(at + F * L, f, mask=here)
    tl.store(at + CARRIED * L, carried, mask=here)
    tl.store(at + FORGOT * L, forgot, mask=here)

    # What other threads of this program wrote is read from here on.
    tl.debug_barrier()
    KIND: tl.constexpr = G.dtype.element_ty
    row, column = tl.arange(0, L), tl.arange(0, L)
    for i in range(first, tl.minimum(first + TOGETHER, GATES)):
        made = vectors + (place + i) * (VECTORS * L)
        # G is an operand later, so its factors need no more digits than operands have, which is what logs
        # with zeros among them still give.
        keeps = _between(made + FORGOT * L, L).to(KIND)
        carries = _between(made + CARRIED * L, L).to(KIND)
        weight = tl.dot(keeps, carries, input_precision=PRECISION)
        weight *= tl.load(made + THETA * L + column)[None, :]
        tl.store(G + (place + i) * (L * L) + row[:, None] * L + column[None, :], weight)


def cell_decays(
    logits: Tensor,
    out: CellDecays,
    limits: tuple[float, float, float],
    epsilon: float,
    cells: Tensor,
    cell: int,
    length: int,
) -> None:
    """From ``gate_logits``; ``limits`` are the largest theta, eta and alpha."""
    _, chunks, heads, depth, _, _ = out.G.shape
    decays_kernel[(cells.shape[1], chunks, triton.cdiv(heads * depth, TOGETHER))](
        logits,
        out.vectors,
        out.G,
        cells,
        cells.shape[1],
        *limits,
        epsilon,
        N=logits.shape[1],
        HEADS=heads,
        LAYERS=depth,
        CELL=cell,
        L=length,
        VECTORS=VECTORS,
        TOGETHER=TOGETHER,
        PRECISION=PRECISIONS[out.G.dtype],
        num_warps=WARPS,
        num_stages=1,
    )
