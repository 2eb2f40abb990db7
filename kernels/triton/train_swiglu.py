"""silu(gate) value of one product with gradients, a launch forward and one backward. Knows no product."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LAUNCH = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def _halves(up, e, count, HIDDEN: tl.constexpr):
    """Of elements ``e`` of the output: where value and gate stand, both, and which there are."""
    at = e // HIDDEN * (2 * HIDDEN) + e % HIDDEN
    here = e < count
    value = tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(up + at + HIDDEN, mask=here, other=0.0).to(tl.float32)
    return at, value, gate, here


@triton.jit
def swiglu_kernel(up, y, count, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """``up`` `[rows, 2 HIDDEN]`: values, and gates."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, value, gate, here = _halves(up, e, count, HIDDEN)
    tl.store(y + e, (value * gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty), mask=here)


@triton.jit
def swiglu_gradient_kernel(up, g_y, g_up, count, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at, value, gate, here = _halves(up, e, count, HIDDEN)
    g = tl.load(g_y + e, mask=here, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(g_up + at, (g * gate * s).to(g_up.dtype.element_ty), mask=here)
    g_gate = g * value * s * (1.0 + gate * (1.0 - s))
    tl.store(g_up + at + HIDDEN, g_gate.to(g_up.dtype.element_ty), mask=here)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor) -> Tensor:
        hidden = up.shape[-1] // 2
        y = torch.empty((*up.shape[:-1], hidden), dtype=up.dtype, device=up.device)
        count = y.numel()
        swiglu_kernel[(triton.cdiv(count, LAUNCH["BLOCK"]),)](up, y, count, HIDDEN=hidden, **LAUNCH)
        ctx.save_for_backward(up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (up,) = ctx.saved_tensors
        g_y = gradients[0].contiguous()
        g_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        count, hidden = g_y.numel(), g_y.shape[-1]
        swiglu_gradient_kernel[(triton.cdiv(count, LAUNCH["BLOCK"]),)](
            up, g_y, g_up, count, HIDDEN=hidden, **LAUNCH
        )
        return g_up


def swiglu(up: Tensor) -> Tensor:
    """``up`` `[..., 2 hidden]`, values and gates, to `[..., hidden]` of its type; differentiable once."""
    y: Tensor = _SwiGLU.apply(up.contiguous())
    return y
