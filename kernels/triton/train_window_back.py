"""Back through attention over a window: a program goes over the blocks that one block of queries sees, or
over the blocks of queries that see one of keys. Scores are made again, from the sums that forward left.
Counterpart of ``train_window``; knows no position but the start's."""

from __future__ import annotations

import triton
import triton.language as tl

from mnemosyne.kernels.triton.train_operand import operand


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision=PRECISION)


@triton.jit
def looks(t, c, first, W: tl.constexpr):
    """Whether queries ``t`` may look at keys ``c``, which broadcast: the last W, none before position 0."""
    return (c > t) & (c <= t + W) & (first + c >= W)


@triton.jit
def _score_gradients(qt, kt, vt, gt, log_sum, along, seen, scale, PRECISION: tl.constexpr):
    """Of a tile of queries and one of keys: the weights, and the gradient of q k^T."""
    scores = product(qt, tl.trans(kt), PRECISION) * scale
    weights = tl.where(seen, tl.exp(tl.where(seen, scores - log_sum[:, None], 0.0)), 0.0)
    g_weights = product(gt, tl.trans(vt), PRECISION)
    return weights, weights * (g_weights - along[:, None]) * scale


@triton.jit
def query_gradient_kernel(
    q,
    k,
    v,
    persistent_k,
    persistent_v,
    start,
    y,
    sums,
    g_y,
    alongs,
    g_q,
    g_persistent_k,
    g_persistent_v,
    T,
    scale,
    HEADS: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    PERSISTENT: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``g_y`` as y; ``alongs`` `[B, HEADS, T]`: y's part of it; ``g_persistent_*`` `[B, T / L, HEADS, P, D]`:
    each program's share."""
    cell = tl.program_id(1).to(tl.int64)
    b = cell // HEADS
    h = cell % HEADS
    d = tl.arange(0, D)
    row = tl.arange(0, L)
    t = tl.program_id(0) * L + row
    first = tl.load(start + b)
    qt = tl.load(q + (cell * T + t)[:, None] * D + d[None, :])
    beside = ((b * T + t) * HEADS + h)[:, None] * D + d[None, :]
    gt = tl.load(g_y + beside)
    along = tl.sum(gt.to(tl.float32) * tl.load(y + beside).to(tl.float32), 1)
    tl.store(alongs + cell * T + t, along)
    log_sum = tl.load(sums + cell * T + t)
    g_qt = tl.zeros([L, D], tl.float32)
    share = ((b * (T // L) + tl.program_id(0)) * HEADS + h) * P
    for p0 in tl.static_range(0, P, PERSISTENT):
        p = p0 + tl.arange(0, PERSISTENT)
        here = (p < P)[:, None]
        own = (h * P + p)[:, None] * D + d[None, :]
        own_k = tl.load(persistent_k + own, mask=here, other=0.0)
        own_v = tl.load(persistent_v + own, mask=here, other=0.0)
        weights, g_own = _score_gradients(
            qt, own_k, own_v, gt, log_sum, along, (p < P)[None, :], scale, PRECISION
        )
        g_own = g_own.to(qt.dtype)
        g_qt += product(g_own, own_k, PRECISION)
        own = (share + p)[:, None] * D + d[None, :]
        tl.store(g_persistent_k + own, product(tl.trans(g_own), qt, PRECISION), mask=here)
        tl.store(g_persistent_v + own, product(tl.trans(weights.to(gt.dtype)), gt, PRECISION), mask=here)
    for j in range(W // L + 1):
        c = (tl.program_id(0) + j) * L + row
        at = (cell * (W + T) + c)[:, None] * D + d[None, :]
        seen = looks(t[:, None], c[None, :], first, W)
        kt = tl.load(k + at)
        vt = tl.load(v + at)
        _, g_scores = _score_gradients(qt, kt, vt, gt, log_sum, along, seen, scale, PRECISION)
        g_qt += product(g_scores.to(kt.dtype), kt, PRECISION)
    tl.store(g_q + (cell * T + t)[:, None] * D + d[None, :], g_qt.to(g_q.dtype.element_ty))


@triton.jit
def key_gradient_kernel(
    q,
    k,
    v,
    start,
    sums,
    g_y,
    alongs,
    g_k,
    g_v,
    T,
    scale,
    HEADS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of one block of keys and values; nothing looks at those before position 0."""
    cell = tl.program_id(1).to(tl.int64)
    b = cell // HEADS
    h = cell % HEADS
    d = tl.arange(0, D)
    row = tl.arange(0, L)
    block = tl.program_id(0)
    c = block * L + row
    at = (cell * (W + T) + c)[:, None] * D + d[None, :]
    first = tl.load(start + b)
    kt = tl.load(k + at)
    vt = tl.load(v + at)
    g_kt = tl.zeros([L, D], tl.float32)
    g_vt = tl.zeros([L, D], tl.float32)
    low = tl.maximum(block - W // L, 0)
    high = tl.minimum(block + 1, T // L)
    for i in range(low, high):
        t = i * L + row
        qt = tl.load(q + (cell * T + t)[:, None] * D + d[None, :])
        gt = tl.load(g_y + ((b * T + t) * HEADS + h)[:, None] * D + d[None, :])
        log_sum = tl.load(sums + cell * T + t)
        along = tl.load(alongs + cell * T + t)
        seen = looks(t[:, None], c[None, :], first, W)
        weights, g_scores = _score_gradients(qt, kt, vt, gt, log_sum, along, seen, scale, PRECISION)
        g_vt += product(tl.trans(weights.to(gt.dtype)), gt, PRECISION)
        g_kt += product(tl.trans(g_scores.to(qt.dtype)), qt, PRECISION)
    tl.store(g_k + at, g_kt.to(g_k.dtype.element_ty))
    tl.store(g_v + at, g_vt.to(g_v.dtype.element_ty))
