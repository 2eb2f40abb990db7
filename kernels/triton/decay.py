"""``gates.decays`` as one launch: a program makes the decays of one chunk in one head and memory layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mnemosyne.kernels.gates import Decays, Gates, Past
from mnemosyne.kernels.triton.support import PRECISIONS


@triton.jit
def _ratios(factor, ROWS: tl.constexpr):
    """As ``gates._ratios``: products over (j, t], and over [1, t], by logs; a factor of 0 is a reset."""
    t = tl.arange(0, ROWS)
    reset = factor <= 0.0
    logs = tl.cumsum(tl.where(reset, 0.0, tl.log(tl.where(reset, 1.0, factor))), 0)
    count = tl.cumsum(reset.to(tl.int32), 0)
    kept = (t[:, None] >= t[None, :]) & (count[:, None] == count[None, :])
    difference = tl.where(kept, logs[:, None] - logs[None, :], 0.0)
    return tl.where(kept, tl.exp(difference), 0.0), tl.where(count == 0, tl.exp(logs), 0.0)


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
    L: tl.constexpr,
    ROWS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FORGETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gates `[cells, L]`, names as in ``gates.Decays``; ROWS is L rounded up to a power of two."""
    cell = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, ROWS)
    here = t < L
    at = cell * L + t
    pair = cell * L * L + t[:, None] * L + t[None, :]
    pairs = here[:, None] & here[None, :]
    weight = tl.load(theta + at, mask=here, other=0.0)[None, :]
    keep_factor = tl.full([ROWS], 1.0, tl.float32)
    if FORGETS:
        keep_factor = 1.0 - tl.load(alpha + at, mask=here, other=0.0)
    keep, whole = _ratios(keep_factor, ROWS)
    tl.store(A + at, whole, mask=here)
    if MOMENTUM:
        carry, left = _ratios(tl.load(eta + at, mask=here, other=1.0), ROWS)
        tl.store(E + at, left, mask=here)
        tl.store(F + at, tl.sum(keep * left[None, :], 1), mask=here)
        tl.store(P + pair, carry * weight, mask=pairs)
        keep = tl.dot(keep, carry, input_precision=PRECISION)
    tl.store(G + pair, keep * weight, mask=pairs)


def decays(gates: Gates) -> Decays:
    """``gates.decays`` of what ``support.takes`` agrees to; no gradients."""
    theta = gates.theta.contiguous()
    eta, alpha = (None if x is None else x.contiguous() for x in gates[1:3])
    L = theta.shape[-1]
    square = (*theta.shape, L)
    A, G = torch.empty_like(theta), theta.new_empty(square)
    past = None
    if eta is not None:
        past = Past(torch.empty_like(theta), torch.empty_like(theta), theta.new_empty(square))
    decay_kernel[(theta.numel() // L,)](
        theta,
        theta if eta is None else eta,
        theta if alpha is None else alpha,
        A,
        G,
        *(past or (A, A, G)),
        L=L,
        ROWS=max(triton.next_power_of_2(L), 16),
        MOMENTUM=eta is not None,
        FORGETS=alpha is not None,
        PRECISION=PRECISIONS[theta.dtype],
        num_warps=4 if L <= 64 else 8,
        num_stages=1,
    )
    return Decays(A, G, past)
