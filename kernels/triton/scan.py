"""``chunk.scan`` as one launch: a program walks the chunks of one session's head.

The memory is not held on the chip: what stands at a chunk's start is written for the read anyway, and the
program takes it up again from there, so that any width fits. Products take operands of k's precision and
add up in fp32; the memory and everything that is returned are fp32. One program, one order of sums: the
bits depend neither on the other sessions nor on how many chunks come in one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.chunk import Scan
from mnemosyne.kernels.gates import Decays, Past
from mnemosyne.kernels.rules.rule import MemoryRule
from mnemosyne.kernels.triton.network import clip_factor, gelu, length, output_delta
from mnemosyne.kernels.triton.support import PRECISIONS

SILENT: tl.constexpr = tl.constexpr(1e-30)
"""Memory and momentum below this are 0, as in ``chunk``."""


@triton.jit
def _copy(source_m, source_s, target, SIZE: tl.constexpr, MOMENTUM: tl.constexpr, PIECE: tl.constexpr):
    """M and S of one matrix to where the first chunk takes them from."""
    at = tl.arange(0, PIECE)
    for first in range(0, SIZE, PIECE):
        tl.store(target + first + at, tl.load(source_m + first + at))
        if MOMENTUM:
            tl.store(target + SIZE + first + at, tl.load(source_s + first + at))


@triton.jit
def _stores(weight, delta, like):
    """-(w delta)^T as an operand."""
    return tl.trans((-weight[:, None] * delta).to(like.dtype))


@triton.jit
def _settle(x):
    return tl.where(tl.abs(x) <= SILENT, 0.0, x)


@triton.jit
def _move(
    source,
    target_m,
    target_s,
    at,
    m_stores,
    s_stores,
    a,
    A,
    F,
    E,
    SIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M' = A M + F S - (w delta)^T a and S' = E S - (s delta)^T a of the part of a matrix at ``at``."""
    kept = A * tl.load(source + at)
    if MOMENTUM:
        past = tl.load(source + SIZE + at)
        kept += F * past
        carried = tl.dot(s_stores, a, E * past, input_precision=PRECISION)
        tl.store(target_s + at, _settle(carried))
    kept = tl.dot(m_stores, a, kept, input_precision=PRECISION)
    tl.store(target_m + at, _settle(kept))


@triton.jit
def _decay(A, G, F, E, P, cell, row, here, L: tl.constexpr, MOMENTUM: tl.constexpr):
    """What a chunk's end takes of the decays: rows w and s, scalars A, F and E."""
    last = cell * L + L - 1
    w = tl.load(G + last * L + row, mask=here, other=0.0)
    a_end = tl.load(A + last)
    if MOMENTUM:
        s = tl.load(P + last * L + row, mask=here, other=0.0)
        return w, s, a_end, tl.load(F + last), tl.load(E + last)
    return w, w, a_end, a_end, a_end


@triton.jit
def _clipped(delta, norm, clip, CLIP: tl.constexpr):
    if CLIP:
        delta *= clip_factor(norm, clip)[:, None]
    return delta


@triton.jit(do_not_specialize=["n"])
def scan_kernel(
    k,
    v,
    threshold,
    A,
    G,
    F,
    E,
    P,
    hidden_m,
    hidden_s,
    last_m,
    last_s,
    hidden_starts,
    last_starts,
    hidden_end_m,
    hidden_end_s,
    last_end_m,
    last_end_s,
    inputs,
    hidden_deltas,
    last_deltas,
    norms,
    rstds,
    n,
    clip,
    D: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    HUBER: tl.constexpr,
    CLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tensors as in ``chunk.Scan``, contiguous. ``hidden`` is the first of two memory layers (DEEP), ``last``
    the only or the second one, `[D, H]`; ``inputs`` are those of the last. ROWS is L rounded up to a power of
    two, BLOCK divides H."""
    p = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = D * H
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    DEPTH: tl.constexpr = 2 if DEEP else 1
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    h = tl.arange(0, H)
    here = row < L
    tile = here[:, None]

    first = p * n * PARTS * SIZE
    _copy(last_m + p * SIZE, last_s + p * SIZE, last_starts + first, SIZE, MOMENTUM, 1024)
    if DEEP:
        _copy(hidden_m + p * SIZE, hidden_s + p * SIZE, hidden_starts + first, SIZE, MOMENTUM, 1024)

    for c in range(n):
        # What other threads of this program wrote is read from here on.
        tl.debug_barrier()
        start = (p * n + c) * PARTS * SIZE
        token = (p * n + c) * L
        last_cell = (p * DEPTH + DEPTH - 1) * n + c
        kt = tl.load(k + token * D + row[:, None] * D + d[None, :], mask=tile, other=0.0)
        vt = tl.load(v + token * D + row[:, None] * D + d[None, :], mask=tile, other=0.0).to(tl.float32)
        limit = vt
        if HUBER:
            limit = tl.load(threshold + token + row, mask=here, other=0.0)
        k32 = kt.to(tl.float32)
        k_norm = length(k32)

        if DEEP:
            z = tl.zeros([ROWS, D], tl.float32)
            square = tl.zeros([ROWS], tl.float32)
            for b in range(0, H, BLOCK):
                hb = b + tl.arange(0, BLOCK)
                part = token * H + row[:, None] * H + hb[None, :]
                hidden_w = tl.load(hidden_starts + start + hb[:, None] * D + d[None, :]).to(kt.dtype)
                last_w = tl.load(last_starts + start + d[:, None] * H + hb[None, :]).to(kt.dtype)
                x, slope = gelu(tl.dot(kt, tl.trans(hidden_w), input_precision=PRECISION))
                tl.store(inputs + part, x, mask=tile)
                tl.store(hidden_deltas + part, slope, mask=tile)
                z = tl.dot(x.to(kt.dtype), tl.trans(last_w), z, input_precision=PRECISION)
                square += tl.sum(x * x, 1)
            x_norm = tl.sqrt(square)
        else:
            last_w = tl.load(last_starts + start + d[:, None] * H + h[None, :]).to(kt.dtype)
            z = tl.dot(kt, tl.trans(last_w), input_precision=PRECISION)
            x_norm = k_norm
        delta, rstd = output_delta(z, k32, vt, limit, D, RESIDUAL, NORM, HUBER)
        if DEEP:
            tl.debug_barrier()  # the slopes come back
            square = tl.zeros([ROWS], tl.float32)
            dt = delta.to(kt.dtype)
            for b in range(0, H, BLOCK):
                hb = b + tl.arange(0, BLOCK)
                part = token * H + row[:, None] * H + hb[None, :]
                last_w = tl.load(last_starts + start + d[:, None] * H + hb[None, :]).to(kt.dtype)
                # Stored again below at the same place: every thread has its own part of it, or there is a
                # barrier between, where the two are laid out differently.
                slope = tl.load(hidden_deltas + part, mask=tile, other=0.0)
                piece = tl.dot(dt, last_w, input_precision=PRECISION) * slope
                tl.store(hidden_deltas + part, piece, mask=tile)
                square += tl.sum(piece * piece, 1)
            back_norm = tl.sqrt(square) * k_norm
            hidden_cell = p * DEPTH * n + c
            tl.store(norms + hidden_cell * L + row, back_norm, mask=here)
        if NORM:
            tl.store(rstds + token + row, rstd, mask=here)
        delta_norm = length(delta) * x_norm
        tl.store(norms + last_cell * L + row, delta_norm, mask=here)
        delta = _clipped(delta, delta_norm, clip, CLIP)
        tl.store(last_deltas + token * D + row[:, None] * D + d[None, :], delta, mask=tile)

        w, s, a_end, f_end, e_end = _decay(A, G, F, E, P, last_cell, row, here, L, MOMENTUM)
        m_stores = _stores(w, delta, kt)
        s_stores = _stores(s, delta, kt)
        if c + 1 < n:
            last_to_m = last_starts + start + PARTS * SIZE
            last_to_s = last_to_m + SIZE
        else:
            last_to_m = last_end_m + p * SIZE
            last_to_s = last_end_s + p * SIZE
        if DEEP:
            hw, hs, ha, hf, he = _decay(A, G, F, E, P, hidden_cell, row, here, L, MOMENTUM)
            if c + 1 < n:
                hidden_to_m = hidden_starts + start + PARTS * SIZE
                hidden_to_s = hidden_to_m + SIZE
            else:
                hidden_to_m = hidden_end_m + p * SIZE
                hidden_to_s = hidden_end_s + p * SIZE
            tl.debug_barrier()  # the hidden deltas, before clipping, come back
        for b in range(0, H, BLOCK):
            hb = b + tl.arange(0, BLOCK)
            if DEEP:
                part = token * H + row[:, None] * H + hb[None, :]
                back = tl.load(hidden_deltas + part, mask=tile, other=0.0)
                if CLIP:
                    back = _clipped(back, back_norm, clip, CLIP)
                    tl.store(hidden_deltas + part, back, mask=tile)
                at = hb[:, None] * D + d[None, :]
                _move(
                    hidden_starts + start, hidden_to_m, hidden_to_s, at,
                    _stores(hw, back, kt), _stores(hs, back, kt), kt, ha, hf, he, SIZE, MOMENTUM, PRECISION,
                )  # fmt: skip
                a = tl.load(inputs + part, mask=tile, other=0.0).to(kt.dtype)
            else:
                a = tl.load(k + token * D + row[:, None] * D + hb[None, :], mask=tile, other=0.0)
            at = d[:, None] * H + hb[None, :]
            _move(
                last_starts + start, last_to_m, last_to_s, at,
                m_stores, s_stores, a, a_end, f_end, e_end, SIZE, MOMENTUM, PRECISION,
            )  # fmt: skip


def scan(
    k: Tensor,
    v: Tensor,
    threshold: Tensor | None,
    decay: Decays,
    memory: Sequence[Tensor],
    momentum: Sequence[Tensor],
    rule: MemoryRule,
) -> Scan:
    """``chunk.scan`` for what ``support.missing`` has nothing against; no gradients."""
    B, H, n, L, d = k.shape
    depth, width = len(memory), memory[-1].shape[-1]
    parts = 2 if momentum else 1
    k, v = k.contiguous(), v.contiguous()

    def made(*shape: int) -> Tensor:
        return torch.empty(B, H, *shape, dtype=torch.float32, device=k.device)

    kept, carried = ([x.contiguous() for x in tensors] for tensors in (memory, momentum))
    ends, end_momenta = ([made(*x.shape[2:]) for x in tensors] for tensors in (memory, momentum))
    starts = [made(n, parts, *m.shape[2:]) for m in memory]
    inputs = [k.to(torch.float32)] + [made(n, L, width)] * (depth - 1)
    deltas = [made(n, L, m.shape[2]) for m in memory]
    norms = made(depth, n, L)
    rstd = made(n, L) if rule.architecture.norm else None
    # A kernel needs every pointer: where a rule or a depth has no such tensor, another stands in, untouched.
    past = decay.past or Past(decay.A, decay.A, decay.G)
    decays = [x.contiguous() for x in (decay.A, decay.G, *past)]
    scan_kernel[(B * H,)](
        k,
        v,
        v if threshold is None else threshold.contiguous(),
        *decays,
        *(tensors[i] for i in (0, -1) for tensors in (kept, carried or kept)),
        *(starts[i] for i in (0, -1)),
        *(tensors[i] for i in (0, -1) for tensors in (ends, end_momenta or ends)),
        inputs[-1],
        deltas[0],
        deltas[-1],
        norms,
        norms if rstd is None else rstd,
        n,
        rule.algorithm.clip or 0.0,
        D=d,
        H=width,
        L=L,
        ROWS=triton.next_power_of_2(L),
        DEEP=depth > 1,
        MOMENTUM=bool(momentum),
        RESIDUAL=rule.architecture.residual,
        NORM=rule.architecture.norm,
        HUBER=rule.bias.threshold,
        CLIP=rule.algorithm.clip is not None,
        PRECISION=PRECISIONS[k.dtype],
        **launch(width),
    )
    return Scan(ends, end_momenta, starts, inputs, deltas, norms, rstd)


def launch(width: int) -> dict[str, int]:
    """Of shapes alone, so that bits don't depend on load. Nothing is loaded ahead (one stage): what a chunk
    loads the chunk before it stores."""
    return {"BLOCK": min(width, 64), "num_warps": 4, "num_stages": 1}
