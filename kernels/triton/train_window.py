"""``attention.window_blocks`` with gradients: a program goes over the blocks that one block of queries sees,
where they stand. ``train_window_back`` has the way back. Knows no position but the start's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemosyne.kernels.triton.train_support import precision_of
from mnemosyne.kernels.triton.train_window_back import (
    key_gradient_kernel,
    looks,
    product,
    query_gradient_kernel,
)

LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Below every score, and finite."""
PERSISTENT = 64
"""Tokens of a tile; with fewer, products would take the older form of the tensor cores."""
WINDOW = {"num_warps": 4, "num_stages": 1}
QUERY_GRADIENT = {"num_warps": 4, "num_stages": 1}
KEY_GRADIENT = {"num_warps": 4, "num_stages": 1}
"""Bits depend on them."""


@triton.jit
def _attended(found, top, total, qt, kt, vt, seen, scale, PRECISION: tl.constexpr):
    """Online softmax: what was found so far, its largest score and its sum, and a tile of keys more."""
    scores = tl.where(seen, product(qt, tl.trans(kt), PRECISION) * scale, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - higher[:, None])
    shrunk = tl.exp(top - higher)
    found = found * shrunk[:, None] + product(weights.to(vt.dtype), vt, PRECISION)
    return found, higher, total * shrunk + tl.sum(weights, 1)


@triton.jit
def window_kernel(
    q,
    k,
    v,
    persistent_k,
    persistent_v,
    start,
    y,
    sums,
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
    """``q`` `[B, HEADS, T, D]`, ``k`` and ``v`` `[B, HEADS, W + T, D]`, ``persistent_*`` `[HEADS, P, D]`; to
    ``y`` `[B, T, HEADS, D]` and ``sums`` `[B, HEADS, T]`, of the log of each row's exponentials. PERSISTENT
    is a tile of the persistent tokens."""
    cell = tl.program_id(1).to(tl.int64)
    b = cell // HEADS
    h = cell % HEADS
    d = tl.arange(0, D)
    row = tl.arange(0, L)
    t = tl.program_id(0) * L + row
    first = tl.load(start + b)
    qt = tl.load(q + (cell * T + t)[:, None] * D + d[None, :])
    found = tl.zeros([L, D], tl.float32)
    top = tl.full([L], LOWEST, tl.float32)
    total = tl.zeros([L], tl.float32)
    for p0 in tl.static_range(0, P, PERSISTENT):
        p = p0 + tl.arange(0, PERSISTENT)
        own = (h * P + p)[:, None] * D + d[None, :]
        own_k = tl.load(persistent_k + own, mask=(p < P)[:, None], other=0.0)
        own_v = tl.load(persistent_v + own, mask=(p < P)[:, None], other=0.0)
        found, top, total = _attended(found, top, total, qt, own_k, own_v, (p < P)[None, :], scale, PRECISION)
    for j in range(W // L + 1):
        c = (tl.program_id(0) + j) * L + row
        at = (cell * (W + T) + c)[:, None] * D + d[None, :]
        seen = looks(t[:, None], c[None, :], first, W)
        kt = tl.load(k + at)
        vt = tl.load(v + at)
        found, top, total = _attended(found, top, total, qt, kt, vt, seen, scale, PRECISION)
    out = y + ((b * T + t) * HEADS + h)[:, None] * D + d[None, :]
    tl.store(out, (found / total[:, None]).to(y.dtype.element_ty))
    tl.store(sums + cell * T + t, top + tl.log(total))


class _Window(torch.autograd.Function):
    """``q`` `[B, H, T, d]`, ``k`` and ``v`` `[B, H, W + T, d]`, ``persistent_*`` `[H, P, d]`, all contiguous
    and of one type; to y `[B, T, H, d]`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        persistent_k: Tensor,
        persistent_v: Tensor,
        start: Tensor,
        block: int,
    ) -> Tensor:
        B, H, T, d = q.shape
        P = persistent_k.shape[1]
        constants = {
            "HEADS": H,
            "W": k.shape[2] - T,
            "D": d,
            "L": block,
            "PRECISION": precision_of(q),
        }
        tiles = {"P": P, "PERSISTENT": PERSISTENT}
        y = torch.empty((B, T, H, d), dtype=q.dtype, device=q.device)
        sums = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
        window_kernel[(T // block, B * H)](
            q, k, v, persistent_k, persistent_v, start, y, sums, T, d**-0.5, **constants, **tiles, **WINDOW
        )
        ctx.constants, ctx.tiles = constants, tiles
        ctx.save_for_backward(q, k, v, persistent_k, persistent_v, start, y, sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, persistent_k, persistent_v, start, y, sums = ctx.saved_tensors
        B, H, T, d = q.shape
        L, P = ctx.constants["L"], ctx.tiles["P"]
        g_y = gradients[0].contiguous()
        alongs = torch.empty(sums.shape, dtype=sums.dtype, device=q.device)
        g_q, g_k, g_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        shares = torch.empty((2, B, T // L, H, P, d), dtype=torch.float32, device=q.device)
        query_gradient_kernel[(T // L, B * H)](
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
            *shares.unbind(0),
            T,
            d**-0.5,
            **ctx.constants,
            **ctx.tiles,
            **QUERY_GRADIENT,
        )
        key_gradient_kernel[(k.shape[2] // L, B * H)](
            q, k, v, start, sums, g_y, alongs, g_k, g_v, T, d**-0.5, **ctx.constants, **KEY_GRADIENT
        )
        g_persistent = shares.sum((1, 2)).to(q.dtype).unbind(0)
        return g_q, g_k, g_v, *g_persistent, None, None


def window_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    persistent_k: Tensor,
    persistent_v: Tensor,
    start: Tensor,
    block: int,
) -> Tensor:
    """``attention.window_blocks`` for what ``train_support.attends`` agrees to, differentiable once; by token
    in memory, heads beside each other."""
    persistent = (x.to(q.dtype).contiguous() for x in (persistent_k, persistent_v))
    y: Tensor = _Window.apply(*(x.contiguous() for x in (q, k, v)), *persistent, start, block)
    return y.transpose(1, 2)
