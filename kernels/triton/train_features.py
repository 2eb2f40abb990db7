"""The convolution of projected streams, SiLU and the keys' unit norm with gradients, a launch a stream
forward and one backward: rows of tokens in, heads out. Knows no projection and no memory.

Backward a program makes all that it needs of the forward again: the convolution once for each of the tokens
that a row gave to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON: tl.constexpr = tl.constexpr(1e-6)
"""As in ``network.unit``."""
FEATURE = {"TILE": 64, "num_warps": 8}
FEATURE_GRADIENT = {"TILE": 32, "num_warps": 8, "maxnreg": 128}


@triton.jit
def _rows(streams, tail, b, r, here, c, T, C, KERNEL: tl.constexpr):
    """Rows ``r`` of session b, of which the first KERNEL - 1 are the tail's."""
    before: tl.constexpr = KERNEL - 1
    past = tl.load(
        tail + (b * before + r)[:, None] * C + c[None, :], mask=here & (r < before)[:, None], other=0.0
    )
    own = tl.load(
        streams + (b * T + r - before)[:, None] * C + c[None, :],
        mask=here & (r >= before)[:, None],
        other=0.0,
    )
    return (past + own).to(tl.float32)


@triton.jit
def _mixed(streams, tail, weight, b, t, here, c, inside, T, C, KERNEL: tl.constexpr):
    """The convolution at tokens ``t``."""
    found = tl.zeros(here.shape, tl.float32)
    for j in tl.static_range(KERNEL):
        w = tl.load(weight + j * C + c, mask=inside, other=0.0)[None, :]
        found += _rows(streams, tail, b, t + j, here, c, T, C, KERNEL) * w
    return found


@triton.jit
def _unit(y):
    """1 / |y| of rows, `[rows, 1]`."""
    return (1.0 / tl.sqrt(tl.sum(y * y, 1) + EPSILON))[:, None]


@triton.jit
def feature_kernel(
    streams,
    tail,
    weight,
    out,
    T,
    C,
    first,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    KERNEL: tl.constexpr,
    KEY: tl.constexpr,
):
    """``streams`` `[B, T, C]`, ``tail`` `[B, KERNEL - 1, C]`, ``weight`` `[KERNEL, C]`, ``out`` `[B, HEADS,
    T, D]` of the channels from ``first`` on; a program has TILE tokens of one head."""
    tiles = tl.cdiv(T, TILE)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    h = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < D
    here = (t < T)[:, None] & inside[None, :]
    x = _mixed(streams, tail, weight, b, t, here, first + h * D + d, inside, T, C, KERNEL)
    y = x / (1.0 + tl.exp(-x))
    if KEY:
        y *= _unit(y)
    tl.store(out + ((b * HEADS + h) * T + t)[:, None] * D + d[None, :], y, mask=here)


@triton.jit
def feature_gradient_kernel(
    streams,
    tail,
    weight,
    g_out,
    g_streams,
    g_tail,
    g_weights,
    T,
    C,
    first,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    KERNEL: tl.constexpr,
    KEY: tl.constexpr,
):
    """``g_weights`` `[programs, KERNEL, C]`: each program's share. A program has TILE rows of one head, the
    tail's among them, which gave to tokens up to KERNEL - 1 before them."""
    before: tl.constexpr = KERNEL - 1
    tiles = tl.cdiv(T + before, TILE)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    r = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    h = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < D
    c = first + h * D + d
    found = tl.zeros([TILE, BLOCK], tl.float32)
    for i in tl.range(KERNEL, num_stages=1):
        t = r - i
        here = ((t >= 0) & (t < T))[:, None] & inside[None, :]
        x = _mixed(streams, tail, weight, b, t, here, c, inside, T, C, KERNEL)
        g = tl.load(g_out + ((b * HEADS + h) * T + t)[:, None] * D + d[None, :], mask=here, other=0.0)
        s = 1.0 / (1.0 + tl.exp(-x))
        if KEY:
            y = x * s
            scale = _unit(y)
            y *= scale
            g = scale * (g - y * tl.sum(g * y, 1)[:, None])
        g *= s * (1.0 + x * (1.0 - s))
        found += g * tl.load(weight + i * C + c, mask=inside, other=0.0)[None, :]
        if i == 0:
            for j in tl.static_range(KERNEL):
                x = _rows(streams, tail, b, t + j, here, c, T, C, KERNEL)
                share = g_weights + (tl.program_id(0).to(tl.int64) * KERNEL + j) * C + c
                tl.store(share, tl.sum(g * x, 0), mask=inside)
    own = g_streams + (b * T + r - before)[:, None] * C + c[None, :]
    kept = (r >= before) & (r < T + before)
    tl.store(own, found.to(g_streams.dtype.element_ty), mask=kept[:, None] & inside[None, :])
    past = g_tail + (b * before + r)[:, None] * C + c[None, :]
    tl.store(past, found.to(g_tail.dtype.element_ty), mask=(r < before)[:, None] & inside[None, :])


class _Features(torch.autograd.Function):
    """``streams`` `[B, T, C]` and ``tail`` `[B, K - 1, C]` of one type, ``weight`` `[K, C]`; to C / (heads
    head_dim) tensors `[B, heads, T, head_dim]` in fp32, the first ``keys`` of them of unit norm."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, tail: Tensor, weight: Tensor, heads: int, head_dim: int, keys: int
    ) -> tuple[Tensor, ...]:
        (B, T, C), K = streams.shape, weight.shape[0]
        count = C // (heads * head_dim)
        constants = {"HEADS": heads, "D": head_dim, "BLOCK": triton.next_power_of_2(head_dim), "KERNEL": K}
        out = torch.empty((count, B, heads, T, head_dim), dtype=torch.float32, device=streams.device)
        made = out.unbind(0)
        for i, one in enumerate(made):
            feature_kernel[(B * triton.cdiv(T, FEATURE["TILE"]), heads)](
                streams,
                tail,
                weight,
                one,
                T,
                C,
                i * heads * head_dim,
                **constants,
                KEY=i < keys,
                **FEATURE,
            )
        ctx.constants, ctx.keys = constants, keys
        ctx.save_for_backward(streams, tail, weight)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        streams, tail, weight = ctx.saved_tensors
        (B, T, C), K = streams.shape, weight.shape[0]
        heads, head_dim = ctx.constants["HEADS"], ctx.constants["D"]
        programs = B * triton.cdiv(T + K - 1, FEATURE_GRADIENT["TILE"])
        g_streams, g_tail = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (streams, tail))
        g_weights = torch.empty((programs, K, C), dtype=torch.float32, device=streams.device)
        for i, gradient in enumerate(gradients):
            feature_gradient_kernel[(programs, heads)](
                streams,
                tail,
                weight,
                gradient.contiguous(),
                g_streams,
                g_tail,
                g_weights,
                T,
                C,
                i * heads * head_dim,
                **ctx.constants,
                KEY=i < ctx.keys,
                **FEATURE_GRADIENT,
            )
        return g_streams, g_tail, g_weights.sum(0), None, None, None


def features(
    streams: Tensor, tail: Tensor, weight: Tensor, heads: int, head_dim: int, keys: int
) -> list[Tensor]:
    """What ``NeuralMemory.features`` makes of projected streams and their tail; differentiable once."""
    tail = tail.to(streams.dtype).contiguous()
    return list(_Features.apply(streams.contiguous(), tail, weight.contiguous(), heads, head_dim, keys))
