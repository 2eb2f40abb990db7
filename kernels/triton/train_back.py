"""The backward of a training step's scan: one kernel walks the chunks in reverse and does only what the
state's own gradient needs, the other makes every other gradient, of all chunks at once.

Nothing is kept for it but what ``chunk.Scan`` has anyway. The state's gradient and all sums are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mnemosyne.kernels.triton.network import length, normalize
from mnemosyne.kernels.triton.train_learn import chunk_end
from mnemosyne.kernels.triton.train_network import through_clip, through_moments, through_norm
from mnemosyne.kernels.triton.train_operand import operand


@triton.jit
def _to_product(
    g_m,
    g_s,
    kt,
    w,
    s,
    M,
    v,
    deltas,
    norms,
    g_deltas,
    g_norms,
    g_rstds,
    cell,
    row,
    at,
    clip,
    D: tl.constexpr,
    L: tl.constexpr,
    MOMENTUM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the gradients of M and S at a chunk's end to those of z = k M^T, of the loss' slope and of |k|.
    Also delta."""
    delta = operand(tl.load(deltas + cell * L * D + at), PRECISION)
    g_delta = tl.load(g_deltas + cell * L * D + at)
    weighted = operand(-w[:, None] * kt, PRECISION)
    g_delta = tl.dot(weighted, operand(tl.trans(g_m), PRECISION), g_delta, input_precision=PRECISION)
    if MOMENTUM:
        weighted = operand(-s[:, None] * kt, PRECISION)
        g_delta = tl.dot(weighted, operand(tl.trans(g_s), PRECISION), g_delta, input_precision=PRECISION)
    norm = tl.load(norms + cell * L + row)
    g_norm = tl.load(g_norms + cell * L + row)
    g_e, g_length, e = through_clip(g_delta, delta, norm, g_norm, length(kt), clip, CLIP)
    if NORM:
        out, rstd = normalize(tl.dot(kt, tl.trans(operand(M, PRECISION)), input_precision=PRECISION), D)
        error = out - tl.load(v + cell * L * D + at)
        if RESIDUAL:
            error += kt
        g_rstd = tl.load(g_rstds + cell * L + row)
        g_slope, g_out, g_rstd = through_norm(g_e, e, out, rstd, g_rstd, 2.0 * error, D)
        g_z = through_moments(g_out + 2.0 * g_slope, out, rstd, g_rstd, D)
    else:
        g_slope = g_e
        g_z = 2.0 * g_e
    return operand(g_z, PRECISION), g_slope, g_length, delta


@triton.jit(do_not_specialize=["n"])
def state_gradient_kernel(
    k,
    v,
    scalars,
    rows,
    starts,
    end_m,
    end_s,
    deltas,
    norms,
    g_end_m,
    g_end_s,
    g_starts,
    g_deltas,
    g_norms,
    g_rstds,
    g_ends,
    g_memory,
    g_momentum,
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
    """The gradients of M, and S, at the end of every chunk, ``g_ends``, shaped as ``starts``, and of those
    at the start of the first. What was settled to 0 passes no gradient on."""
    p = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = D * D
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    row = tl.arange(0, L)
    d = tl.arange(0, D)
    at = row[:, None] * D + d[None, :]
    square = d[:, None] * D + d[None, :]
    g_m = tl.load(g_end_m + p * SIZE + square)
    g_m = tl.where(tl.load(end_m + p * SIZE + square) == 0.0, 0.0, g_m)
    g_s = g_m
    if MOMENTUM:
        g_s = tl.load(g_end_s + p * SIZE + square)
        g_s = tl.where(tl.load(end_s + p * SIZE + square) == 0.0, 0.0, g_s)
    for i in range(n):
        c = n - 1 - i
        cell = p * n + c
        start = cell * PARTS * SIZE + square
        tl.store(g_ends + start, g_m)
        if MOMENTUM:
            tl.store(g_ends + start + SIZE, g_s)
        kt = operand(tl.load(k + cell * L * D + at), PRECISION)
        M = tl.load(starts + start)
        w, s, a, f, e = chunk_end(scalars, rows, cell, row, L, MOMENTUM)
        g_z, _, _, _ = _to_product(
            g_m, g_s, kt, w, s, M, v, deltas, norms, g_deltas, g_norms, g_rstds, cell, row, at, clip,
            D, L, MOMENTUM, RESIDUAL, NORM, CLIP, PRECISION,
        )  # fmt: skip
        if MOMENTUM:
            g_s = f * g_m + e * g_s + tl.load(g_starts + start + SIZE)
            g_s = tl.where((c > 0) & (tl.load(starts + start + SIZE) == 0.0), 0.0, g_s)
        g_m = a * g_m + tl.load(g_starts + start)
        g_m = tl.dot(tl.trans(g_z), kt, g_m, input_precision=PRECISION)
        g_m = tl.where((c > 0) & (M == 0.0), 0.0, g_m)
    tl.store(g_memory + p * SIZE + square, g_m)
    if MOMENTUM:
        tl.store(g_momentum + p * SIZE + square, g_s)


@triton.jit
def token_gradient_kernel(
    k,
    v,
    scalars,
    rows,
    starts,
    deltas,
    norms,
    g_inputs,
    g_deltas,
    g_norms,
    g_rstds,
    g_ends,
    g_k,
    g_v,
    g_scalars,
    g_rows,
    clip,
    D: tl.constexpr,
    L: tl.constexpr,
    MOMENTUM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of one chunk's keys, values and decays, by those of its end."""
    cell = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = D * D
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    COUNT: tl.constexpr = 3 if MOMENTUM else 1
    row = tl.arange(0, L)
    d = tl.arange(0, D)
    at = row[:, None] * D + d[None, :]
    start = cell * PARTS * SIZE + d[:, None] * D + d[None, :]
    kt = operand(tl.load(k + cell * L * D + at), PRECISION)
    M = operand(tl.load(starts + start), PRECISION)
    g_m = operand(tl.load(g_ends + start), PRECISION)
    g_s = g_m
    if MOMENTUM:
        g_s = operand(tl.load(g_ends + start + SIZE), PRECISION)
    w, s, _, _, _ = chunk_end(scalars, rows, cell, row, L, MOMENTUM)
    g_z, g_slope, g_length, delta = _to_product(
        g_m, g_s, kt, w, s, M, v, deltas, norms, g_deltas, g_norms, g_rstds, cell, row, at, clip,
        D, L, MOMENTUM, RESIDUAL, NORM, CLIP, PRECISION,
    )  # fmt: skip
    tl.store(g_v + cell * L * D + at, -2.0 * g_slope)
    k_norm = length(kt)
    along = tl.where(k_norm > 0.0, g_length / tl.where(k_norm > 0.0, k_norm, 1.0), 0.0)
    g_kt = tl.load(g_inputs + cell * L * D + at) + along[:, None] * kt
    if RESIDUAL:
        g_kt += 2.0 * g_slope
    g_kt = tl.dot(g_z, M, g_kt, input_precision=PRECISION)
    # What a store took of its key: delta_j^T (gradient of the end), once for each weight.
    taken = tl.dot(delta, g_m, input_precision=PRECISION)
    g_kt -= w[:, None] * taken
    tl.store(g_rows + cell * PARTS * L + row, -tl.sum(taken * kt, 1))
    tl.store(g_scalars + cell * COUNT, tl.sum(g_m * M))
    if MOMENTUM:
        S = tl.load(starts + start + SIZE)
        taken = tl.dot(delta, g_s, input_precision=PRECISION)
        g_kt -= s[:, None] * taken
        tl.store(g_rows + cell * PARTS * L + L + row, -tl.sum(taken * kt, 1))
        tl.store(g_scalars + cell * COUNT + 1, tl.sum(g_m * S))
        tl.store(g_scalars + cell * COUNT + 2, tl.sum(g_s * S))
    tl.store(g_k + cell * L * D + at, g_kt)
