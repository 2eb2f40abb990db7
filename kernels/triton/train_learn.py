"""The forward of a training step's scan: a program walks the chunks of one session's head with M and S on the
chip, fp32. Knows no gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from mnemosyne.kernels.triton.network import clip_factor, length, output_delta
from mnemosyne.kernels.triton.scan import SILENT
from mnemosyne.kernels.triton.train_operand import operand


@triton.jit
def _settle(x):
    return tl.where(tl.abs(x) <= SILENT, 0.0, x)


@triton.jit
def chunk_end(scalars, rows, cell, row, L: tl.constexpr, MOMENTUM: tl.constexpr):
    """What a chunk's end takes of the decays: rows w and s `[L]`, scalars A, F and E."""
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    COUNT: tl.constexpr = 3 if MOMENTUM else 1
    w = tl.load(rows + cell * PARTS * L + row)
    a = tl.load(scalars + cell * COUNT)
    if MOMENTUM:
        s = tl.load(rows + cell * PARTS * L + L + row)
        return w, s, a, tl.load(scalars + cell * COUNT + 1), tl.load(scalars + cell * COUNT + 2)
    return w, w, a, a, a


@triton.jit(do_not_specialize=["n"])
def learn_kernel(
    k,
    v,
    scalars,
    rows,
    memory,
    momentum,
    starts,
    end_m,
    end_s,
    deltas,
    norms,
    rstds,
    n,
    clip,
    D: tl.constexpr,
    L: tl.constexpr,
    MOMENTUM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tensors as in ``chunk.Scan``; ``scalars`` `[B, H, n, 1 or 3]`, ``rows`` `[B, H, n, 1 or 2, L]``."""
    p = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = D * D
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    row = tl.arange(0, L)
    d = tl.arange(0, D)
    at = row[:, None] * D + d[None, :]
    square = d[:, None] * D + d[None, :]
    M = tl.load(memory + p * SIZE + square)
    S = M
    if MOMENTUM:
        S = tl.load(momentum + p * SIZE + square)
    for c in range(n):
        cell = p * n + c
        tl.store(starts + cell * PARTS * SIZE + square, M)
        if MOMENTUM:
            tl.store(starts + cell * PARTS * SIZE + SIZE + square, S)
        kt = operand(tl.load(k + cell * L * D + at), PRECISION)
        vt = tl.load(v + cell * L * D + at)
        w, s, a, f, e = chunk_end(scalars, rows, cell, row, L, MOMENTUM)
        z = tl.dot(kt, operand(tl.trans(M), PRECISION), input_precision=PRECISION)
        delta, rstd = output_delta(z, kt, vt, w, D, RESIDUAL, NORM, False)
        norm = length(delta) * length(kt)
        tl.store(norms + cell * L + row, norm)
        if NORM:
            tl.store(rstds + cell * L + row, rstd)
        if CLIP:
            delta *= clip_factor(norm, clip)[:, None]
        tl.store(deltas + cell * L * D + at, delta)
        kept = a * M
        if MOMENTUM:
            kept += f * S
            stored = operand(tl.trans(-s[:, None] * delta), PRECISION)
            S = _settle(tl.dot(stored, kt, e * S, input_precision=PRECISION))
        stored = operand(tl.trans(-w[:, None] * delta), PRECISION)
        M = _settle(tl.dot(stored, kt, kept, input_precision=PRECISION))
    tl.store(end_m + p * SIZE + square, M)
    if MOMENTUM:
        tl.store(end_s + p * SIZE + square, S)
