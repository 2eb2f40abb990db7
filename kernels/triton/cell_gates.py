"""Gates of a cell's tokens, and the decays of its chunks that are made of them. Counterpart of
``kernels.gates`` and of ``gates`` in ``engine.memory``, for the Titans rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.cells import CHUNKS, LAYER, TOKENS, cell_field
from mnemosyne.kernels.triton.decay import _ratios
from mnemosyne.kernels.triton.support import PRECISIONS

W: tl.constexpr = tl.constexpr(0)
S: tl.constexpr = tl.constexpr(1)
A: tl.constexpr = tl.constexpr(2)
F: tl.constexpr = tl.constexpr(3)
E: tl.constexpr = tl.constexpr(4)
THETA: tl.constexpr = tl.constexpr(5)
VECTORS = 6
"""Per token: w, s (its weights in M and S at the chunk's end), A, F, E after it, theta."""


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
    PRECISION: tl.constexpr,
):
    """Programs are (cell, chunk, tile of COLUMNS gates)."""
    cell = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if chunk >= cell_field(cells, CHUNKS, cell, count):
        return
    layer = cell_field(cells, LAYER, cell, count)
    row = cell * CELL + chunk * L + tl.arange(0, L)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    kk = tl.arange(0, DEPTH)
    acc = tl.zeros([L, COLUMNS], tl.float32)
    for k in range(0, K, DEPTH):
        x = tl.load(u + row[:, None] * K + k + kk[None, :])
        for part in tl.static_range(PARTS):
            at = ((layer * PARTS + part) * N + c[None, :]) * K + k + kk[:, None]
            acc = tl.dot(x, tl.load(weight + at), acc, input_precision=PRECISION)
    acc += tl.load(bias + layer * N + c)[None, :]
    tl.store(out + row[:, None] * N + c[None, :], acc)


def gate_logits(
    u: Tensor, weight: Tensor, bias: Tensor, out: Tensor, cells: Tensor, cell: int, length: int
) -> None:
    """Of rows ``u`` `[cells cell, K]`, by ``weight`` `[layers, parts, N, K]`, whose parts add up, and
    ``bias`` `[layers, N]`: fp32 `[cells cell, N]`."""
    _, parts, N, K = weight.shape
    logits_kernel[(cells.shape[1], cell // length, N // 64)](
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
        PRECISION=PRECISIONS[u.dtype],
        num_warps=4,
        num_stages=4 if u.dtype == torch.bfloat16 else 1,
    )


@triton.jit
def gate(z, top, epsilon):
    """top * relu(sigmoid(z) - eps) / (1 - eps)."""
    return tl.maximum(1.0 / (1.0 + tl.exp(-z)) - epsilon, 0.0) * (top / (1.0 - epsilon))


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
    PRECISION: tl.constexpr,
):
    """Programs are (cell, chunk, head's memory layer)."""
    cell = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if chunk >= cell_field(cells, CHUNKS, cell, count):
        return
    GATES: tl.constexpr = HEADS * LAYERS
    gated = tl.program_id(2)
    t = tl.arange(0, L)
    z = logits + (cell * CELL + chunk * L + t) * N + gated
    theta = gate(tl.load(z), theta_max, epsilon)
    eta = gate(tl.load(z + GATES), eta_max, epsilon)
    alpha = gate(tl.load(z + 2 * GATES), alpha_max, epsilon)
    keep, whole = _ratios(1.0 - alpha, L)
    carry, left = _ratios(eta, L)
    KIND: tl.constexpr = G.dtype.element_ty
    # G is an operand later, so its factors need no more digits than operands have; what moves M and S does.
    weight = tl.dot(keep.to(KIND), carry.to(KIND), input_precision=PRECISION) * theta[None, :]
    place = (cell * (CELL // L) + chunk) * GATES + gated
    tl.store(G + place * L * L + t[:, None] * L + t[None, :], weight)
    # What the chunk's end takes is the last counted token's row.
    last = tl.minimum(cell_field(cells, TOKENS, cell, count) - chunk * L, L) - 1
    kept = tl.sum(tl.where((t == last)[:, None], keep, 0.0), 0)
    kept = tl.sum(tl.trans(tl.broadcast_to(kept[None, :], [L, L])) * carry, 0)
    at = vectors + place * VECTORS * L + t
    tl.store(at + W * L, kept * theta)
    tl.store(at + S * L, tl.sum(tl.where((t == last)[:, None], carry, 0.0), 0) * theta)
    tl.store(at + A * L, whole)
    tl.store(at + F * L, tl.sum(keep * left[None, :], 1))
    tl.store(at + E * L, left)
    tl.store(at + THETA * L, theta)


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
    decays_kernel[(cells.shape[1], chunks, heads * depth)](
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
        PRECISION=PRECISIONS[out.G.dtype],
        num_warps=8,
        num_stages=1,
    )
