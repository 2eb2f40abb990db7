"""RMS norm of rows with gradients, of a sum of two where there is one, a launch forward and one backward.

What is normed is fp32 inside; the output has the precision of the products that take it. Knows no module.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS = 4096
"""Of a tile."""
BACK = 2048
"""Of a tile on the way back, of which more is held at once."""
STEPS = 8
"""Tiles of a program on the way back."""


@triton.jit
def scale_of(x, epsilon, WIDTH: tl.constexpr):
    """1 / rms of rows, ``[rows, 1]``."""
    return (1.0 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + epsilon))[:, None]


@triton.jit
def through_scale(g, x, scale, WIDTH: tl.constexpr):
    """From the gradient of ``x``, rows normed by ``scale``, to that of the rows before."""
    return scale * (g - x * (tl.sum(g * x, 1) / WIDTH)[:, None])


@triton.jit
def norm_kernel(
    x,
    more,
    weight,
    total,
    y,
    count,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    MORE: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    at = r[:, None] * WIDTH + d[None, :]
    here = (r < count)[:, None] & (d < WIDTH)[None, :]
    xt = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if MORE:
        xt += tl.load(more + at, mask=here, other=0.0).to(tl.float32)
        tl.store(total + at, xt, mask=here)
    w = tl.load(weight + d, mask=d < WIDTH, other=0.0)[None, :]
    tl.store(y + at, (xt * scale_of(xt, epsilon, WIDTH) * w).to(y.dtype.element_ty), mask=here)


@triton.jit
def norm_gradient_kernel(
    x,
    weight,
    g_y,
    g_total,
    g_x,
    g_more,
    g_weights,
    count,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    TOTAL: tl.constexpr,
    MORE: tl.constexpr,
):
    """``x`` is what was normed. TOTAL: something came back through it beside its norm. MORE: what was added
    has another type than x, and a gradient of its own. ``g_weights`` `[programs, WIDTH]`."""
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + d, mask=d < WIDTH, other=0.0)[None, :]
    share = tl.zeros([BLOCK], tl.float32)
    for i in range(STEPS):
        r = (tl.program_id(0).to(tl.int64) * STEPS + i) * ROWS + tl.arange(0, ROWS)
        at = r[:, None] * WIDTH + d[None, :]
        here = (r < count)[:, None] & (d < WIDTH)[None, :]
        xt = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(g_y + at, mask=here, other=0.0).to(tl.float32)
        scale = scale_of(xt, epsilon, WIDTH)
        xt *= scale
        share += tl.sum(g * xt, 0)
        g = through_scale(g * w, xt, scale, WIDTH)
        if TOTAL:
            g += tl.load(g_total + at, mask=here, other=0.0)
        tl.store(g_x + at, g.to(g_x.dtype.element_ty), mask=here)
        if MORE:
            tl.store(g_more + at, g.to(g_more.dtype.element_ty), mask=here)
    tl.store(g_weights + tl.program_id(0) * WIDTH + d, share, mask=d < WIDTH)


def tile_of(x: Tensor, elements: int) -> tuple[int, dict[str, int]]:
    """Rows of ``x``, and the sizes of a program's tile of so many elements."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    return x.numel() // width, {"WIDTH": width, "BLOCK": block, "ROWS": max(1, elements // block)}


class _Norm(torch.autograd.Function):
    """``x`` and ``more``, which may be None, of one shape; to their sum, None where there is none, and its
    norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        count, tile = tile_of(x, ELEMENTS)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        total = None if more is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        normed = x if total is None else total
        norm_kernel[(triton.cdiv(count, tile["ROWS"]),)](
            x,
            x if more is None else more,
            weight,
            normed,
            y,
            count,
            epsilon,
            **tile,
            MORE=more is not None,
            num_warps=4,
        )
        ctx.epsilon, ctx.types = epsilon, (x.dtype, None if more is None else more.dtype)
        ctx.save_for_backward(normed, weight)
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        normed, weight = ctx.saved_tensors
        of_x, of_more = ctx.types
        g_total, g_y = (None if g is None else g.contiguous() for g in gradients)
        if g_y is None:
            return g_total, None if g_total is None else g_total.to(of_more), None, None, None
        count, tile = tile_of(normed, BACK)
        programs = triton.cdiv(count, tile["ROWS"] * STEPS)
        g_x = torch.empty(normed.shape, dtype=of_x, device=normed.device)
        own = of_more is not None and of_more != of_x
        g_more = torch.empty(normed.shape, dtype=of_more, device=normed.device) if own else g_x
        g_weights = torch.empty((programs, tile["WIDTH"]), dtype=torch.float32, device=normed.device)
        norm_gradient_kernel[(programs,)](
            normed,
            weight,
            g_y,
            g_y if g_total is None else g_total,
            g_x,
            g_more,
            g_weights,
            count,
            ctx.epsilon,
            **tile,
            STEPS=STEPS,
            TOTAL=g_total is not None,
            MORE=own,
            num_warps=4,
        )
        return g_x, None if of_more is None else g_more, g_weights.sum(0), None, None


def norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) ``weight`` of rows `[..., width]`, in ``dtype``; differentiable once."""
    y: Tensor = _Norm.apply(x.contiguous(), None, weight, epsilon, dtype)[1]
    return y


def add(x: Tensor, more: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + more in fp32, of x in fp32, and its norm."""
    total, y = _Norm.apply(x.contiguous(), more.contiguous(), weight, epsilon, dtype)
    return total, y
