"""What a memory was read to its output product: per-head norm and sigmoid gate, heads side by side, with
gradients, a launch forward and one backward. Knows no product and no memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemosyne.kernels.triton.train_norm import ELEMENTS, scale_of, through_scale

TILES = 4
"""Of a program that goes backward."""


@triton.jit
def _places(tile, h, T, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Where a tile of head h's tokens stands in `[B, HEADS, T, WIDTH]` and in `[B, T, HEADS WIDTH]`, and
    which there are."""
    tiles = tl.cdiv(T, ROWS)
    b = (tile // tiles).to(tl.int64)
    t = tile % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    apart = ((b * HEADS + h) * T + t)[:, None] * WIDTH + d[None, :]
    beside = ((b * T + t) * HEADS + h)[:, None] * WIDTH + d[None, :]
    return apart, beside, (t < T)[:, None] & (d < WIDTH)[None, :]


@triton.jit
def emit_kernel(
    y,
    z,
    weight,
    out,
    T,
    epsilon,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    apart, beside, here = _places(tl.program_id(0), tl.program_id(1), T, HEADS, WIDTH, BLOCK, ROWS)
    d = tl.arange(0, BLOCK)
    yt = tl.load(y + apart, mask=here, other=0.0).to(tl.float32)
    yt *= scale_of(yt, epsilon, WIDTH) * tl.load(weight + d, mask=d < WIDTH, other=0.0)[None, :]
    zt = tl.load(z + beside, mask=here, other=0.0).to(tl.float32)
    tl.store(out + beside, (yt / (1.0 + tl.exp(-zt))).to(out.dtype.element_ty), mask=here)


@triton.jit
def emit_gradient_kernel(
    y,
    z,
    weight,
    g_out,
    g_y,
    g_z,
    g_weights,
    T,
    tiles,
    epsilon,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """``g_weights`` `[programs, WIDTH]`: each program's share; a program has TILES of ``tiles``."""
    h = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + d, mask=d < WIDTH, other=0.0)[None, :]
    share = tl.zeros([BLOCK], tl.float32)
    for i in range(TILES):
        tile = tl.program_id(0) * TILES + i
        apart, beside, here = _places(tile, h, T, HEADS, WIDTH, BLOCK, ROWS)
        here = here & (tile < tiles)
        yt = tl.load(y + apart, mask=here, other=0.0).to(tl.float32)
        scale = scale_of(yt, epsilon, WIDTH)
        yt *= scale
        s = 1.0 / (1.0 + tl.exp(-tl.load(z + beside, mask=here, other=0.0).to(tl.float32)))
        g = tl.load(g_out + beside, mask=here, other=0.0).to(tl.float32) * s
        share += tl.sum(g * yt, 0)
        g *= w
        tl.store(g_z + beside, (g * yt * (1.0 - s)).to(g_z.dtype.element_ty), mask=here)
        tl.store(g_y + apart, through_scale(g, yt, scale, WIDTH).to(g_y.dtype.element_ty), mask=here)
    program = tl.program_id(0) * HEADS + h
    tl.store(g_weights + program * WIDTH + d, share, mask=d < WIDTH)


def _tile_of(y: Tensor) -> dict[str, int]:
    _, heads, T, width = y.shape
    block = triton.next_power_of_2(width)
    rows = min(max(1, ELEMENTS // block), triton.next_power_of_2(T))
    return {"HEADS": heads, "WIDTH": width, "BLOCK": block, "ROWS": rows}


class _Emit(torch.autograd.Function):
    """``y`` `[B, heads, T, width]`, ``z`` `[B, T, heads width]`; to z's shape and type."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        B, heads, T, _ = y.shape
        tile = _tile_of(y)
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        emit_kernel[(B * triton.cdiv(T, tile["ROWS"]), heads)](
            y, z, weight, out, T, epsilon, **tile, num_warps=4
        )
        ctx.epsilon = epsilon
        ctx.save_for_backward(y, z, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        B, heads, T, width = y.shape
        tile = _tile_of(y)
        tiles = B * triton.cdiv(T, tile["ROWS"])
        programs = triton.cdiv(tiles, TILES)
        g_y, g_z = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (y, z))
        g_weights = torch.empty((programs * heads, width), dtype=torch.float32, device=y.device)
        emit_gradient_kernel[(programs, heads)](
            y,
            z,
            weight,
            gradients[0].contiguous(),
            g_y,
            g_z,
            g_weights,
            T,
            tiles,
            ctx.epsilon,
            **tile,
            TILES=TILES,
            num_warps=8,
        )
        return g_y, g_z, g_weights.sum(0), None


def emit(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """sigmoid(z) times the per-head norm of y, heads side by side: ``y`` `[B, H, T, d]`, ``z`` and what comes
    out `[B, T, H d]`; differentiable once."""
    out: Tensor = _Emit.apply(y.contiguous(), z.contiguous(), weight, epsilon)
    return out
