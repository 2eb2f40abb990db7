"""``chunk.scan`` of a memory of one matrix, with gradients: what a training step runs on a GPU.

One launch forward (``train_learn``), two backward (``train_back``). Knows no gate and no read: ``chunk.read``
consumes what is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemosyne.kernels.chunk import Scan
from mnemosyne.kernels.gates import Decays
from mnemosyne.kernels.rules.rule import MemoryRule
from mnemosyne.kernels.triton.train_back import state_gradient_kernel, token_gradient_kernel
from mnemosyne.kernels.triton.train_learn import learn_kernel
from mnemosyne.kernels.triton.train_support import Form, form_of, made

LEARN = {"num_warps": 4, "num_stages": 2}
STATE_GRADIENT = {"num_warps": 8, "num_stages": 2}
TOKEN_GRADIENT = {"num_warps": 8, "num_stages": 1}
"""Of each kernel; bits depend on it."""


class _Scan(torch.autograd.Function):
    """``k``, ``v`` `[B, H, n, L, d]`, ``scalars`` `[B, H, n, 1 or 3]`, ``rows`` `[B, H, n, 1 or 2, L]`, the
    memory and the momentum `[B, H, d, d]`, all contiguous and fp32; to the ends of both, starts, inputs,
    deltas, norms `[B, H, n, L]`, and rstd likewise. Without momentum, or norm, another tensor stands in for
    what isn't there, untouched, for a kernel needs every pointer."""

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        scalars: Tensor,
        rows: Tensor,
        memory: Tensor,
        momentum: Tensor | None,
        form: Form,
    ) -> tuple[Tensor | None, ...]:
        B, H, n, L, d = k.shape
        end_m, end_s = made(memory), None if momentum is None else made(momentum)
        starts = made(k, B, H, n, rows.shape[3], d, d)
        deltas, norms = made(k), made(k, B, H, n, L)
        rstd = made(norms) if form.norm else None
        learn_kernel[(B * H,)](
            k,
            v,
            scalars,
            rows,
            memory,
            memory if momentum is None else momentum,
            starts,
            end_m,
            end_m if end_s is None else end_s,
            deltas,
            norms,
            norms if rstd is None else rstd,
            n,
            form.clip or 0.0,
            D=d,
            L=L,
            CLIP=form.clip is not None,
            **form.constants(),
            **LEARN,
        )
        ctx.form = form
        ctx.save_for_backward(k, v, scalars, rows, starts, end_m, end_s, deltas, norms)
        return end_m, end_s, starts, k.view_as(k), deltas, norms, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        form: Form = ctx.form
        k, v, scalars, rows, starts, end_m, end_s, deltas, norms = ctx.saved_tensors
        B, H, n, L, d = k.shape
        g_end_m, g_end_s, g_starts, g_inputs, g_deltas, g_norms, g_rstd = (
            None if x is None else x.contiguous() for x in gradients
        )
        assert g_norms is not None
        g_rstd = g_norms if g_rstd is None else g_rstd
        g_ends, g_memory = made(starts), made(end_m)
        g_momentum = None if end_s is None else made(end_s)
        constants = {"D": d, "L": L, "CLIP": form.clip is not None, **form.constants()}
        state_gradient_kernel[(B * H,)](
            k,
            v,
            scalars,
            rows,
            starts,
            end_m,
            end_m if end_s is None else end_s,
            deltas,
            norms,
            g_end_m,
            g_end_m if g_end_s is None else g_end_s,
            g_starts,
            g_deltas,
            g_norms,
            g_rstd,
            g_ends,
            g_memory,
            g_memory if g_momentum is None else g_momentum,
            n,
            form.clip or 0.0,
            **constants,
            **STATE_GRADIENT,
        )
        g_k, g_v, g_scalars, g_rows = (made(x) for x in (k, v, scalars, rows))
        token_gradient_kernel[(B * H * n,)](
            k,
            v,
            scalars,
            rows,
            starts,
            deltas,
            norms,
            g_inputs,
            g_deltas,
            g_norms,
            g_rstd,
            g_ends,
            g_k,
            g_v,
            g_scalars,
            g_rows,
            form.clip or 0.0,
            **constants,
            **TOKEN_GRADIENT,
        )
        return g_k, g_v, g_scalars, g_rows, g_memory, g_momentum, None


def scan(
    k: Tensor,
    v: Tensor,
    decay: Decays,
    memory: Sequence[Tensor],
    momentum: Sequence[Tensor],
    rule: MemoryRule,
) -> Scan:
    """``chunk.scan`` for what ``train_support.missing`` has nothing against, differentiable once."""
    k, v, kept = (x.to(torch.float32).contiguous() for x in (k, v, memory[0]))
    carried = momentum[0].to(torch.float32).contiguous() if momentum else None
    scalars, rows = (x.squeeze(2).contiguous() for x in decay.end)
    end_m, end_s, starts, inputs, deltas, norms, rstd = _Scan.apply(
        k, v, scalars, rows, kept, carried, form_of(rule)
    )
    return Scan(
        [end_m], [] if end_s is None else [end_s], [starts], [inputs], [deltas], norms.unsqueeze(2), rstd
    )
