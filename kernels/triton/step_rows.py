"""Norms, the block's gate and the residual sum for one token a session. Counterpart of ``rows``, where a cell
has many; here a program has one row to itself, and all of its threads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.rows import NOTHING, Kind, Operands, normed
from mnemosyne.kernels.triton.step_table import begin


@triton.jit
def step_rows_kernel(
    residual,
    y,
    m,
    out,
    weight,
    norm_y,
    norm_m,
    epsilon,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    inside = column < N
    scale = tl.load(weight + column, mask=inside, other=0.0)
    if KIND == "gate" or KIND == "paper":
        scale_y = tl.load(norm_y + column, mask=inside, other=0.0)
        scale_m = tl.load(norm_m + column, mask=inside, other=0.0)
    begin()
    here = inside[None, :]
    at = tl.program_id(0) * N + column[None, :]
    x = tl.load((y if KIND == "between" else residual) + at, mask=here, other=0.0).to(tl.float32)
    if KIND == "gate" or KIND == "paper":
        from_y = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        from_m = tl.load(m + at, mask=here, other=0.0).to(tl.float32)
        from_y = normed(from_y, scale_y, N, epsilon)
        from_m = normed(from_m, scale_m, N, epsilon)
        x += from_y / (1.0 + tl.exp(-from_m))
        if KIND == "gate":
            x += from_m
        tl.store(residual + at, x, mask=here)
    tl.store(out + at, normed(x, scale, N, epsilon), mask=here)


def step_rows(
    kind: Kind,
    residual: Tensor,
    out: Tensor,
    weight: Tensor,
    epsilon: float,
    operands: Operands = NOTHING,
) -> None:
    """As ``rows.rows``, of one layer: ``residual`` and ``out`` `[sessions, N]`, norms' weights `[N]`. There
    is no "add": the product before adds to the stream itself."""
    sessions, N = out.shape
    y, m, norm_y, norm_m = operands
    step_rows_kernel[(sessions,)](
        residual,
        out if y is None else y,
        out if m is None else m,
        out,
        weight,
        weight if norm_y is None else norm_y,
        weight if norm_m is None else norm_m,
        epsilon,
        N=N,
        WIDTH=triton.next_power_of_2(N),
        KIND=kind,
        num_warps=8,
        launch_pdl=True,
    )
