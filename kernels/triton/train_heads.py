"""One product of attention to rotated queries and keys, and values, by head, keys and values behind those
that came before: with gradients, a launch forward and one backward. Knows no product and no attention."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 64
"""Tokens of a program, which has one head's."""


@triton.jit
def _places(T, W, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Where the first halves of a tile stand in the product, among queries, among keys and values, and in the
    angles; which there are."""
    WIDTH: tl.constexpr = 2 * HALF
    tiles = tl.cdiv(T, TILE)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.program_id(1)
    t = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    d = tl.arange(0, BLOCK)
    product = ((b * T + t) * 3 * HEADS + h)[:, None] * WIDTH + d[None, :]
    own = ((b * HEADS + h) * T + t)[:, None] * WIDTH + d[None, :]
    kept = ((b * HEADS + h) * (T + W) + W + t)[:, None] * WIDTH + d[None, :]
    angle = (b * T + t)[:, None] * HALF + d[None, :]
    return product, own, kept, angle, (t < T)[:, None] & (d < HALF)[None, :]


@triton.jit
def _pair(x, at, here, HALF: tl.constexpr):
    first = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    return first, tl.load(x + at + HALF, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _store(x, at, here, first, second, HALF: tl.constexpr):
    tl.store(x + at, first.to(x.dtype.element_ty), mask=here)
    tl.store(x + at + HALF, second.to(x.dtype.element_ty), mask=here)


@triton.jit
def heads_kernel(
    product,
    cos,
    sin,
    q,
    k,
    v,
    T,
    W,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """``product`` `[B, T, 3, HEADS, 2 HALF]`, ``cos`` and ``sin`` `[B, T, HALF]`, ``q`` `[B, HEADS, T, 2
    HALF]`, ``k`` and ``v`` `[B, HEADS, W + T, 2 HALF]`, of which W rows aren't touched."""
    at, own, kept, angle, here = _places(T, W, HEADS, HALF, BLOCK, TILE)
    c = tl.load(cos + angle, mask=here, other=0.0)
    s = tl.load(sin + angle, mask=here, other=0.0)
    first, second = _pair(product, at, here, HALF)
    _store(q, own, here, first * c - second * s, second * c + first * s, HALF)
    first, second = _pair(product, at + 2 * HEADS * HALF, here, HALF)
    _store(k, kept, here, first * c - second * s, second * c + first * s, HALF)
    first, second = _pair(product, at + 4 * HEADS * HALF, here, HALF)
    _store(v, kept, here, first, second, HALF)


@triton.jit
def heads_gradient_kernel(
    cos,
    sin,
    g_q,
    g_k,
    g_v,
    g_product,
    T,
    W,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    at, own, kept, angle, here = _places(T, W, HEADS, HALF, BLOCK, TILE)
    c = tl.load(cos + angle, mask=here, other=0.0)
    s = tl.load(sin + angle, mask=here, other=0.0)
    first, second = _pair(g_q, own, here, HALF)
    _store(g_product, at, here, first * c + second * s, second * c - first * s, HALF)
    first, second = _pair(g_k, kept, here, HALF)
    _store(g_product, at + 2 * HEADS * HALF, here, first * c + second * s, second * c - first * s, HALF)
    first, second = _pair(g_v, kept, here, HALF)
    _store(g_product, at + 4 * HEADS * HALF, here, first, second, HALF)


class _Heads(torch.autograd.Function):
    """``product`` `[B, T, 3 heads d]`; the past's keys and values `[B, heads, W, d]`; ``cos`` and ``sin``
    `[B, 1, T, d / 2]`, which get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, product: Tensor, past_k: Tensor, past_v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (B, heads, W, d), T = past_k.shape, product.shape[1]
        constants = {"HEADS": heads, "HALF": d // 2, "BLOCK": triton.next_power_of_2(d // 2), "TILE": TILE}
        q, k, v = (
            torch.empty((B, heads, rows, d), dtype=product.dtype, device=product.device)
            for rows in (T, W + T, W + T)
        )
        k[:, :, :W] = past_k
        v[:, :, :W] = past_v
        heads_kernel[(B * triton.cdiv(T, TILE), heads)](
            product, cos, sin, q, k, v, T, W, **constants, num_warps=4
        )
        ctx.constants, ctx.width = constants, W
        ctx.save_for_backward(cos, sin)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        g_q, g_k, g_v = (g.contiguous() for g in gradients)
        B, heads, T, d = g_q.shape
        W = ctx.width
        g_product = torch.empty((B, T, 3 * heads * d), dtype=g_q.dtype, device=g_q.device)
        heads_gradient_kernel[(B * triton.cdiv(T, TILE), heads)](
            cos, sin, g_q, g_k, g_v, g_product, T, W, **ctx.constants, num_warps=4
        )
        return g_product, g_k[:, :, :W], g_v[:, :, :W], None, None


def heads(
    product: Tensor, past_k: Tensor, past_v: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, H, T, d]`, and keys and values `[B, H, W + T, d]`, of ``product`` `[B, T, 3 H d]`;
    differentiable once, but for the angles."""
    past_k, past_v = (x.to(product.dtype) for x in (past_k, past_v))
    q, k, v = _Heads.apply(product.contiguous(), past_k, past_v, cos.contiguous(), sin.contiguous())
    return q, k, v
