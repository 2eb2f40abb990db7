"""``chunk.read`` of a memory of one matrix, with gradients, one launch forward and one backward: a program
reads one chunk in one head. Knows no gate and nothing of how the memory came about."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemosyne.kernels.chunk import Scan
from mnemosyne.kernels.gates import Decays
from mnemosyne.kernels.rules.rule import MemoryRule
from mnemosyne.kernels.triton.network import normalize
from mnemosyne.kernels.triton.train_network import through_moments
from mnemosyne.kernels.triton.train_operand import operand
from mnemosyne.kernels.triton.train_support import Form, form_of, made


@triton.jit
def read_kernel(
    q,
    k,
    A,
    F,
    G,
    starts,
    deltas,
    y,
    rstds,
    D: tl.constexpr,
    L: tl.constexpr,
    MOMENTUM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tensors as ``chunk.read`` has them."""
    cell = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = D * D
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    t = tl.arange(0, L)
    d = tl.arange(0, D)
    at = cell * L * D + t[:, None] * D + d[None, :]
    start = starts + cell * PARTS * SIZE + d[:, None] * D + d[None, :]
    qt = operand(tl.load(q + at), PRECISION)
    kt = operand(tl.load(k + at), PRECISION)
    scores = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    scores *= tl.load(G + cell * L * L + t[:, None] * L + t[None, :])
    stood = operand(tl.load(start), PRECISION)
    z = tl.load(A + cell * L + t)[:, None] * tl.dot(qt, tl.trans(stood), input_precision=PRECISION)
    if MOMENTUM:
        stood = operand(tl.load(start + SIZE), PRECISION)
        z += tl.load(F + cell * L + t)[:, None] * tl.dot(qt, tl.trans(stood), input_precision=PRECISION)
    delta = operand(tl.load(deltas + at), PRECISION)
    z = tl.dot(operand(-scores, PRECISION), delta, z, input_precision=PRECISION)
    if NORM:
        z, rstd = normalize(z, D)
        tl.store(rstds + cell * L + t, rstd)
    if RESIDUAL:
        z += tl.load(q + at)
    tl.store(y + at, z)


@triton.jit
def read_gradient_kernel(
    q,
    k,
    A,
    F,
    G,
    starts,
    deltas,
    y,
    rstds,
    g_y,
    g_q,
    g_k,
    g_A,
    g_F,
    g_G,
    g_starts,
    g_deltas,
    D: tl.constexpr,
    L: tl.constexpr,
    MOMENTUM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of all that ``read_kernel`` takes."""
    cell = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = D * D
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    t = tl.arange(0, L)
    d = tl.arange(0, D)
    at = cell * L * D + t[:, None] * D + d[None, :]
    pair = cell * L * L + t[:, None] * L + t[None, :]
    start = cell * PARTS * SIZE + d[:, None] * D + d[None, :]
    qt = operand(tl.load(q + at), PRECISION)
    g_z = tl.load(g_y + at)
    g_qt = tl.zeros([L, D], tl.float32)
    if RESIDUAL:
        g_qt = g_z
    if NORM:
        out = tl.load(y + at)
        if RESIDUAL:
            out -= tl.load(q + at)
        rstd = tl.load(rstds + cell * L + t)
        g_z = through_moments(g_z, out, rstd, 0.0 * rstd, D)

    g_z = operand(g_z, PRECISION)
    back = tl.dot(g_z, operand(tl.load(starts + start), PRECISION), input_precision=PRECISION)
    share = tl.load(A + cell * L + t)[:, None]
    g_qt += share * back
    tl.store(g_A + cell * L + t, tl.sum(back * qt, 1))
    shared = operand(tl.trans(share * g_z), PRECISION)
    tl.store(g_starts + start, tl.dot(shared, qt, input_precision=PRECISION))
    if MOMENTUM:
        back = tl.dot(g_z, operand(tl.load(starts + start + SIZE), PRECISION), input_precision=PRECISION)
        share = tl.load(F + cell * L + t)[:, None]
        g_qt += share * back
        tl.store(g_F + cell * L + t, tl.sum(back * qt, 1))
        shared = operand(tl.trans(share * g_z), PRECISION)
        tl.store(g_starts + start + SIZE, tl.dot(shared, qt, input_precision=PRECISION))

    kt = operand(tl.load(k + at), PRECISION)
    scores = -tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    weight = tl.load(G + pair)
    delta = operand(tl.load(deltas + at), PRECISION)
    g_weighted = tl.dot(g_z, tl.trans(delta), input_precision=PRECISION)
    weighted = operand(tl.trans(scores * weight), PRECISION)
    tl.store(g_deltas + at, tl.dot(weighted, g_z, input_precision=PRECISION))
    tl.store(g_G + pair, g_weighted * scores)
    g_scores = operand(-g_weighted * weight, PRECISION)
    tl.store(g_q + at, tl.dot(g_scores, kt, g_qt, input_precision=PRECISION))
    tl.store(g_k + at, tl.dot(tl.trans(g_scores), qt, input_precision=PRECISION))


READ = {"num_warps": 8, "num_stages": 1}
READ_GRADIENT = {"num_warps": 8, "num_stages": 1}
"""Bits depend on them."""


class _Read(torch.autograd.Function):
    """``q``, ``k``, ``deltas`` and y `[B, H, n, L, d]`, ``A``, ``F`` and ``G`` as in ``gates.Decays``,
    ``starts`` `[B, H, n, 1 or 2, d, d]`, all contiguous and fp32; ``F`` None without momentum."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        A: Tensor,
        F: Tensor | None,
        G: Tensor,
        starts: Tensor,
        deltas: Tensor,
        form: Form,
    ) -> Tensor:
        B, H, n, L, d = q.shape
        y = made(q)
        rstd = made(q, B, H, n, L) if form.norm else None
        read_kernel[(B * H * n,)](
            q,
            k,
            A,
            A if F is None else F,
            G,
            starts,
            deltas,
            y,
            A if rstd is None else rstd,
            D=d,
            L=L,
            **form.constants(),
            **READ,
        )
        ctx.form = form
        ctx.save_for_backward(q, k, A, F, G, starts, deltas, *((y, rstd) if form.norm else (None, None)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        form: Form = ctx.form
        given = q, k, A, F, G, starts, deltas, y, rstd = ctx.saved_tensors
        B, H, n, L, d = q.shape
        found = [None if x is None else made(x) for x in given[:7]]
        read_gradient_kernel[(B * H * n,)](
            q,
            k,
            A,
            A if F is None else F,
            G,
            starts,
            deltas,
            q if y is None else y,
            A if rstd is None else rstd,
            gradients[0].contiguous(),
            *(found[0] if x is None else x for x in found),
            D=d,
            L=L,
            **form.constants(),
            **READ_GRADIENT,
        )
        return *found, None


def read(q: Tensor, decay: Decays, scanned: Scan, rule: MemoryRule) -> Tensor:
    """``chunk.read`` for what ``train_support.missing`` has nothing against, differentiable once."""
    y: Tensor = _Read.apply(
        q.to(torch.float32).contiguous(),
        scanned.inputs[0].contiguous(),
        decay.A.contiguous(),
        None if decay.past is None else decay.past.F.contiguous(),
        decay.G.contiguous(),
        scanned.starts[0].contiguous(),
        scanned.deltas[0].contiguous(),
        form_of(rule),
    )
    return y
