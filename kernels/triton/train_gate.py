"""gate(y, m) of MAG and MAC, two norms and a sigmoid, with gradients, a launch forward and one backward.

Knows no module and neither what made y nor what made m.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemosyne.kernels.triton.train_norm import BACK, ELEMENTS, STEPS, scale_of, through_scale, tile_of


@triton.jit
def gate_kernel(
    y,
    m,
    weight_y,
    weight_m,
    out,
    count,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PAPER: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    at = r[:, None] * WIDTH + d[None, :]
    here = (r < count)[:, None] & inside[None, :]
    yt = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    yt *= scale_of(yt, epsilon, WIDTH) * tl.load(weight_y + d, mask=inside, other=0.0)[None, :]
    mt = tl.load(m + at, mask=here, other=0.0).to(tl.float32)
    mt *= scale_of(mt, epsilon, WIDTH) * tl.load(weight_m + d, mask=inside, other=0.0)[None, :]
    found = yt / (1.0 + tl.exp(-mt))
    if not PAPER:
        found += mt
    tl.store(out + at, found, mask=here)


@triton.jit
def gate_gradient_kernel(
    y,
    m,
    weight_y,
    weight_m,
    g_out,
    g_y,
    g_m,
    g_weights_y,
    g_weights_m,
    count,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    PAPER: tl.constexpr,
):
    """``g_weights_*`` `[programs, WIDTH]`: each program's share."""
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    w_y = tl.load(weight_y + d, mask=inside, other=0.0)[None, :]
    w_m = tl.load(weight_m + d, mask=inside, other=0.0)[None, :]
    share_y = tl.zeros([BLOCK], tl.float32)
    share_m = tl.zeros([BLOCK], tl.float32)
    for i in range(STEPS):
        r = (tl.program_id(0).to(tl.int64) * STEPS + i) * ROWS + tl.arange(0, ROWS)
        at = r[:, None] * WIDTH + d[None, :]
        here = (r < count)[:, None] & inside[None, :]
        g = tl.load(g_out + at, mask=here, other=0.0).to(tl.float32)
        yt = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        scale_y = scale_of(yt, epsilon, WIDTH)
        yt *= scale_y
        mt = tl.load(m + at, mask=here, other=0.0).to(tl.float32)
        scale_m = scale_of(mt, epsilon, WIDTH)
        mt *= scale_m
        s = 1.0 / (1.0 + tl.exp(-mt * w_m))
        g_normed = g * s
        g_gate = g_normed * (1.0 - s) * yt * w_y
        if not PAPER:
            g_gate += g
        share_y += tl.sum(g_normed * yt, 0)
        share_m += tl.sum(g_gate * mt, 0)
        found = through_scale(g_normed * w_y, yt, scale_y, WIDTH)
        tl.store(g_y + at, found.to(g_y.dtype.element_ty), mask=here)
        found = through_scale(g_gate * w_m, mt, scale_m, WIDTH)
        tl.store(g_m + at, found.to(g_m.dtype.element_ty), mask=here)
    share = tl.program_id(0) * WIDTH + d
    tl.store(g_weights_y + share, share_y, mask=inside)
    tl.store(g_weights_m + share, share_m, mask=inside)


class _Gate(torch.autograd.Function):
    """``y`` and ``m`` of one shape; to fp32."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, m: Tensor, weight_y: Tensor, weight_m: Tensor, epsilon: float, paper: bool
    ) -> Tensor:
        count, tile = tile_of(y, ELEMENTS)
        out = torch.empty(y.shape, dtype=torch.float32, device=y.device)
        gate_kernel[(triton.cdiv(count, tile["ROWS"]),)](
            y, m, weight_y, weight_m, out, count, epsilon, **tile, PAPER=paper, num_warps=4
        )
        ctx.epsilon, ctx.paper = epsilon, paper
        ctx.save_for_backward(y, m, weight_y, weight_m)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, m, weight_y, weight_m = ctx.saved_tensors
        count, tile = tile_of(y, BACK)
        programs = triton.cdiv(count, tile["ROWS"] * STEPS)
        g_y, g_m = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (y, m))
        shares = torch.empty((2, programs, tile["WIDTH"]), dtype=torch.float32, device=y.device)
        gate_gradient_kernel[(programs,)](
            y,
            m,
            weight_y,
            weight_m,
            gradients[0].contiguous(),
            g_y,
            g_m,
            *shares.unbind(0),
            count,
            ctx.epsilon,
            **tile,
            STEPS=STEPS,
            PAPER=ctx.paper,
            num_warps=4,
        )
        return g_y, g_m, *shares.sum(1).unbind(0), None, None


def gate(y: Tensor, m: Tensor, weight_y: Tensor, weight_m: Tensor, epsilon: float, paper: bool) -> Tensor:
    """n1(y) sigmoid(n2(m)), and n2(m) added but for ``paper``, of rows `[..., width]`, in fp32;
    differentiable once."""
    out: Tensor = _Gate.apply(y.contiguous(), m.contiguous(), weight_y, weight_m, epsilon, paper)
    return out
