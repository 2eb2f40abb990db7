"""The gates that a memory's tokens decide by: a product of few columns, sigmoids and what closes them, with
gradients, a launch forward and one backward. Knows no memory; of what a gate is for only its largest value.

Below the threshold a gate is 0 and its gradient is the sigmoid's, as in ``gates.gate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemosyne.kernels.triton.train_operand import operand
from mnemosyne.kernels.triton.train_support import precision

LAUNCH = {"TILE": 64, "DEPTH": 64, "num_warps": 4, "num_stages": 1}
"""Tokens of a program, and columns of a token that it multiplies at once."""


@triton.jit
def _tops(n, CELLS: tl.constexpr, first_top, second_top, third_top):
    """Of gates ``n``, of which CELLS follow each other for each kind."""
    return tl.where(n < CELLS, first_top, tl.where(n < 2 * CELLS, second_top, third_top))


@triton.jit
def _places(tile, n, B, T, CELLS: tl.constexpr, GATES: tl.constexpr, TILE: tl.constexpr):
    """The tokens of a tile, where their rows begin, where their gates ``n`` stand in `[kinds, B, CELLS, T]`,
    and which there are of both."""
    tiles = tl.cdiv(T, TILE)
    b = (tile // tiles).to(tl.int64)
    t = tile % tiles * TILE + tl.arange(0, TILE)
    gate = (((n // CELLS) * B + b) * CELLS + n % CELLS)[None, :] * T + t[:, None]
    return (b * T + t)[:, None], gate, (t < T)[:, None], (n < GATES)[None, :]


@triton.jit
def token_gates_kernel(
    u,
    weight,
    bias,
    out,
    opened,
    B,
    T,
    dim,
    epsilon,
    first_top,
    second_top,
    third_top,
    CELLS: tl.constexpr,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``u`` `[B, T, dim]`, ``weight`` `[GATES, dim]`, ``bias`` `[GATES]`; to ``out`` and ``opened``, gates
    and sigmoids `[kinds, B, CELLS, T]`. COLUMNS is GATES, or more."""
    n = tl.arange(0, COLUMNS)
    row, gate, there, known = _places(tl.program_id(0), n, B, T, CELLS, GATES, TILE)
    z = tl.zeros([TILE, COLUMNS], tl.float32)
    for start in range(0, dim, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = tl.load(u + row * dim + d[None, :], mask=there & (d < dim)[None, :], other=0.0).to(tl.float32)
        w = tl.load(weight + n[None, :] * dim + d[:, None], mask=known & (d < dim)[:, None], other=0.0)
        z = tl.dot(operand(x, PRECISION), operand(w, PRECISION), z, input_precision=PRECISION)
    z += tl.load(bias + n, mask=n < GATES, other=0.0)[None, :]
    s = 1.0 / (1.0 + tl.exp(-z))
    top = _tops(n, CELLS, first_top, second_top, third_top)[None, :]
    tl.store(opened + gate, s, mask=there & known)
    tl.store(out + gate, tl.maximum(s - epsilon, 0.0) * (top / (1.0 - epsilon)), mask=there & known)


@triton.jit
def token_gates_gradient_kernel(
    u,
    weight,
    opened,
    g_first,
    g_second,
    g_third,
    g_u,
    g_weights,
    g_biases,
    B,
    T,
    dim,
    epsilon,
    first_top,
    second_top,
    third_top,
    CELLS: tl.constexpr,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``g_first`` and so on `[B, CELLS, T]`, one for each kind that there is; ``g_weights`` `[programs,
    GATES, dim]` and ``g_biases`` `[programs, GATES]`: each program's share."""
    n = tl.arange(0, COLUMNS)
    row, gate, there, known = _places(tl.program_id(0), n, B, T, CELLS, GATES, TILE)
    s = tl.load(opened + gate, mask=there & known, other=0.0)
    kind = (n // CELLS)[None, :]
    size = B * CELLS * T
    g = tl.load(g_first + gate, mask=there & known & (kind == 0), other=0.0)
    g += tl.load(g_second + gate - size, mask=there & known & (kind == 1), other=0.0)
    g += tl.load(g_third + gate - 2 * size, mask=there & known & (kind == 2), other=0.0)
    top = _tops(n, CELLS, first_top, second_top, third_top)[None, :]
    g *= s * (1.0 - s) * (top / (1.0 - epsilon))
    program = tl.program_id(0).to(tl.int64)
    tl.store(g_biases + program * GATES + n, tl.sum(g, 0), mask=n < GATES)
    g = operand(g, PRECISION)
    for start in range(0, dim, DEPTH):
        d = start + tl.arange(0, DEPTH)
        at = row * dim + d[None, :]
        here = there & (d < dim)[None, :]
        w = tl.load(
            weight + n[:, None] * dim + d[None, :], mask=(n < GATES)[:, None] & (d < dim)[None, :], other=0.0
        )
        found = tl.dot(g, operand(w, PRECISION), input_precision=PRECISION)
        tl.store(g_u + at, found.to(g_u.dtype.element_ty), mask=here)
        x = tl.load(u + at, mask=here, other=0.0).to(tl.float32)
        share = tl.dot(operand(tl.trans(x), PRECISION), g, input_precision=PRECISION)
        at = (program * GATES + n[None, :]) * dim + d[:, None]
        tl.store(g_weights + at, share, mask=known & (d < dim)[:, None])


class _TokenGates(torch.autograd.Function):
    """``u`` `[B, T, dim]`, ``weight`` and ``bias`` of all kinds, of which each has as many; to one tensor
    `[B, cells, T]` a kind."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, tops: tuple[float, ...], epsilon: float
    ) -> tuple[Tensor, ...]:
        B, T, dim = u.shape
        count = len(weight)
        cells = count // len(tops)
        scalars = (B, T, dim, epsilon, *tops, *(0.0,) * (3 - len(tops)))
        constants = {
            "CELLS": cells,
            "GATES": count,
            "COLUMNS": max(16, triton.next_power_of_2(count)),
            "PRECISION": precision(),
        }
        out, opened = (
            torch.empty((len(tops), B, cells, T), dtype=torch.float32, device=u.device) for _ in range(2)
        )
        programs = B * triton.cdiv(T, LAUNCH["TILE"])
        token_gates_kernel[(programs,)](u, weight, bias, out, opened, *scalars, **constants, **LAUNCH)
        ctx.scalars, ctx.constants = scalars, constants
        ctx.save_for_backward(u, weight, opened)
        return out.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, opened = ctx.saved_tensors
        B, T, dim = u.shape
        count = len(weight)
        programs = B * triton.cdiv(T, LAUNCH["TILE"])
        given = [g.contiguous() for g in gradients]
        given += given[:1] * (3 - len(given))
        g_u = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        g_weights = torch.empty((programs, count, dim), dtype=torch.float32, device=u.device)
        g_biases = torch.empty((programs, count), dtype=torch.float32, device=u.device)
        token_gates_gradient_kernel[(programs,)](
            u,
            weight,
            opened,
            *given,
            g_u,
            g_weights,
            g_biases,
            *ctx.scalars,
            **ctx.constants,
            **LAUNCH,
        )
        return g_u, g_weights.sum(0), g_biases.sum(0), None, None


def token_gates(
    u: Tensor, weight: Tensor, bias: Tensor, tops: Sequence[float], epsilon: float
) -> tuple[Tensor, ...]:
    """Of tokens ``u`` `[B, T, dim]`, by ``weight`` `[kinds cells, dim]` and ``bias``: a tensor `[B, cells,
    T]` for each kind, of up to three, whose largest values are ``tops``; fp32, differentiable once."""
    made: tuple[Tensor, ...] = _TokenGates.apply(
        u.contiguous(), weight.contiguous(), bias.contiguous(), tuple(tops), epsilon
    )
    return made
