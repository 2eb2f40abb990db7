"""``gates.decays`` with gradients, a launch forward and one backward: a program takes one chunk of one head.

The gradient is that of ``gates._ratios`` with gradients: a factor of exactly 0 gets the product of the
others. Of each chunk's last token the decays are given a second time, as tensors of their own: what comes
back through them is a row and no square. Knows no scan and no read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemosyne.kernels.gates import Decays, End, Gates, Past
from mnemosyne.kernels.triton.train_operand import operand
from mnemosyne.kernels.triton.train_support import made, precision


@triton.jit
def _running(factor):
    """Of factors `[L]`: which are resets, sums of logs without them, and how many there were."""
    reset = factor <= 0.0
    logs = tl.cumsum(tl.where(reset, 0.0, tl.log(tl.where(reset, 1.0, factor))), 0)
    return reset, logs, tl.cumsum(reset.to(tl.int32), 0)


@triton.jit
def _ratios(logs, count, RESETS: tl.constexpr, L: tl.constexpr):
    """Products over (j, t], `[L, L]`, without their resets, where there are RESETS of them."""
    t = tl.arange(0, L)
    there = (t[:, None] >= t[None, :]) & (count[:, None] - count[None, :] == RESETS)
    difference = tl.where(there, logs[:, None] - logs[None, :], 0.0)
    return tl.where(there, tl.exp(difference), 0.0)


@triton.jit
def _whole(logs, count, RESETS: tl.constexpr):
    """The same over [1, t], `[L]`."""
    return tl.where(count == RESETS, tl.exp(logs), 0.0)


@triton.jit
def _sums(g_ratios):
    """From the gradient of what depends on x_t - x_j to that of x."""
    return tl.sum(g_ratios, 1) - tl.sum(g_ratios, 0)


@triton.jit
def _through_products(g_ratios, g_whole, factor, ratios, reset, logs, count, L: tl.constexpr):
    """The gradient of the factors `[L]` by those of their products."""
    g_logs = _sums(g_ratios * ratios) + g_whole * _whole(logs, count, 0)
    g_resets = _sums(g_ratios * _ratios(logs, count, 1, L)) + g_whole * _whole(logs, count, 1)
    g_logs = tl.cumsum(g_logs, 0, reverse=True)
    g_resets = tl.cumsum(g_resets, 0, reverse=True)
    return tl.where(reset, g_resets, g_logs / tl.where(reset, 1.0, factor))


@triton.jit
def _factors(eta, alpha, at, L: tl.constexpr, MOMENTUM: tl.constexpr, FORGETS: tl.constexpr):
    keep = tl.full([L], 1.0, tl.float32)
    if FORGETS:
        keep = 1.0 - tl.load(alpha + at)
    carry = keep
    if MOMENTUM:
        carry = tl.load(eta + at)
    return keep, carry


@triton.jit
def decay_kernel(
    theta,
    eta,
    alpha,
    A,
    G,
    F,
    E,
    P,
    scalars,
    rows,
    L: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FORGETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gates `[cells, L]`, names as in ``gates.Decays``, ``scalars`` and ``rows`` as in ``gates.End``."""
    cell = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    t = tl.arange(0, L)
    at = cell * L + t
    last = t == L - 1
    pair = cell * L * L + t[:, None] * L + t[None, :]
    weight = tl.load(theta + at)[None, :]
    keep_factor, carry_factor = _factors(eta, alpha, at, L, MOMENTUM, FORGETS)
    _, logs, count = _running(keep_factor)
    keep = _ratios(logs, count, 0, L)
    whole = _whole(logs, count, 0)
    tl.store(A + at, whole)
    tl.store(scalars + cell * (2 * PARTS - 1) + t * 0, whole, mask=last)
    if MOMENTUM:
        _, logs, count = _running(carry_factor)
        carry = _ratios(logs, count, 0, L)
        left = _whole(logs, count, 0)
        reached = tl.sum(keep * left[None, :], 1)
        tl.store(E + at, left)
        tl.store(F + at, reached)
        tl.store(scalars + cell * 3 + 1 + t * 0, reached, mask=last)
        tl.store(scalars + cell * 3 + 2 + t * 0, left, mask=last)
        keep = tl.dot(operand(keep, PRECISION), operand(carry, PRECISION), input_precision=PRECISION)
        carry *= weight
        tl.store(P + pair, carry)
        tl.store(rows + cell * 2 * L + L + t, tl.sum(tl.where(last[:, None], carry, 0.0), 0))
    keep *= weight
    tl.store(G + pair, keep)
    tl.store(rows + cell * PARTS * L + t, tl.sum(tl.where(last[:, None], keep, 0.0), 0))


@triton.jit
def gate_gradient_kernel(
    theta,
    eta,
    alpha,
    g_A,
    g_G,
    g_F,
    g_E,
    g_P,
    g_scalars,
    g_rows,
    g_theta,
    g_eta,
    g_alpha,
    L: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FORGETS: tl.constexpr,
    WHOLE_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of one chunk's gates. WHOLE_P: something came back through P beside its last rows."""
    cell = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    t = tl.arange(0, L)
    at = cell * L + t
    last = t == L - 1
    pair = cell * L * L + t[:, None] * L + t[None, :]
    weight = tl.load(theta + at)[None, :]
    keep_factor, carry_factor = _factors(eta, alpha, at, L, MOMENTUM, FORGETS)
    keep_reset, keep_logs, keep_count = _running(keep_factor)
    keep = _ratios(keep_logs, keep_count, 0, L)
    g_keep = tl.load(g_G + pair)
    g_keep += tl.where(last[:, None], tl.load(g_rows + cell * PARTS * L + t)[None, :], 0.0)
    if MOMENTUM:
        reset, logs, count = _running(carry_factor)
        carry = _ratios(logs, count, 0, L)
        left = _whole(logs, count, 0)
        left_operand, right_operand = operand(keep, PRECISION), operand(carry, PRECISION)
        g_weight = tl.sum(g_keep * tl.dot(left_operand, right_operand, input_precision=PRECISION), 0)
        g_both = operand(g_keep * weight, PRECISION)
        g_carry = tl.where(last[:, None], tl.load(g_rows + cell * 2 * L + L + t)[None, :], 0.0)
        if WHOLE_P:
            g_carry += tl.load(g_P + pair)
        g_weight += tl.sum(g_carry * carry, 0)
        g_carry = tl.dot(tl.trans(left_operand), g_both, g_carry * weight, input_precision=PRECISION)
        g_reached = tl.load(g_F + at) + tl.where(last, tl.load(g_scalars + cell * 3 + 1), 0.0)
        g_left = tl.load(g_E + at) + tl.where(last, tl.load(g_scalars + cell * 3 + 2), 0.0)
        g_left += tl.sum(keep * g_reached[:, None], 0)
        found = _through_products(g_carry, g_left, carry_factor, carry, reset, logs, count, L)
        tl.store(g_eta + at, found)
        g_keep = tl.dot(g_both, tl.trans(right_operand), input_precision=PRECISION)
        g_keep += g_reached[:, None] * left[None, :]
    else:
        g_weight = tl.sum(g_keep * keep, 0)
        g_keep *= weight
    tl.store(g_theta + at, g_weight)
    if FORGETS:
        g_whole = tl.load(g_A + at) + tl.where(last, tl.load(g_scalars + cell * (2 * PARTS - 1)), 0.0)
        found = _through_products(
            g_keep, g_whole, keep_factor, keep, keep_reset, keep_logs, keep_count, L
        )  # fmt: skip
        tl.store(g_alpha + at, -found)


DECAY = {"num_warps": 8, "num_stages": 1}
GATE_GRADIENT = {"num_warps": 8, "num_stages": 1}
"""Bits depend on them."""


class _Decays(torch.autograd.Function):
    """Gates `[..., L]`, contiguous and fp32; to A, G, F, E, P, scalars, rows, None for what isn't there."""

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, eta: Tensor | None, alpha: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *cells, L = theta.shape
        parts = 1 if eta is None else 2
        A, G = made(theta, *cells, L), made(theta, *cells, L, L)
        F, E, P = (None if eta is None else made(theta, *x.shape) for x in (A, A, G))
        scalars, rows = made(theta, *cells, 2 * parts - 1), made(theta, *cells, parts, L)
        decay_kernel[(theta.numel() // L,)](
            theta,
            theta if eta is None else eta,
            theta if alpha is None else alpha,
            A,
            G,
            A if F is None else F,
            A if E is None else E,
            G if P is None else P,
            scalars,
            rows,
            L=L,
            MOMENTUM=eta is not None,
            FORGETS=alpha is not None,
            PRECISION=precision(),
            **DECAY,
        )
        ctx.save_for_backward(theta, eta, alpha)
        ctx.set_materialize_grads(False)
        return A, G, F, E, P, scalars, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        theta, eta, alpha = ctx.saved_tensors
        *cells, L = theta.shape
        parts = 1 if eta is None else 2
        shapes = ((L,), (L, L), (L,), (L,), None, (2 * parts - 1,), (parts, L))
        g_A, g_G, g_F, g_E, g_P, g_scalars, g_rows = (
            x.contiguous() if x is not None else None if shape is None else theta.new_zeros(*cells, *shape)
            for x, shape in zip(gradients, shapes, strict=True)
        )
        found = [None if x is None else made(x) for x in (theta, eta, alpha)]
        gate_gradient_kernel[(theta.numel() // L,)](
            theta,
            theta if eta is None else eta,
            theta if alpha is None else alpha,
            g_A,
            g_G,
            g_F,
            g_E,
            g_G if g_P is None else g_P,
            g_scalars,
            g_rows,
            *(found[0] if x is None else x for x in found),
            L=L,
            MOMENTUM=eta is not None,
            FORGETS=alpha is not None,
            WHOLE_P=g_P is not None,
            PRECISION=precision(),
            **GATE_GRADIENT,
        )
        return tuple(found)


def decays(gates: Gates) -> Decays:
    """``gates.decays`` of what ``train_support.takes`` agrees to, differentiable once."""
    theta, eta, alpha = (None if x is None else x.contiguous() for x in gates[:3])
    A, G, F, E, P, scalars, rows = _Decays.apply(theta, eta, alpha)
    return Decays(A, G, None if eta is None else Past(F, E, P), End(scalars, rows))
