"""``chunk.read`` as one launch: a program reads a tile of one chunk's tokens in one session's head.

Weights of single tokens are never formed: what stood at the chunk's start, and attention over the chunk's own
stores, one for each memory layer. Products take operands of q's precision and add up in fp32. Nothing passes
between programs, so the bits depend on no neighbour.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.chunk import Scan
from mnemosyne.kernels.gates import Decays
from mnemosyne.kernels.rules.rule import MemoryRule
from mnemosyne.kernels.triton.network import finish, gelu
from mnemosyne.kernels.triton.support import PRECISIONS


@triton.jit
def _decay(A, F, G, cell, query, token, L: tl.constexpr, MOMENTUM: tl.constexpr):
    """Rows of A, F and G for the tile's queries; 0 for what is no token."""
    a = tl.load(A + cell * L + query, mask=query < L, other=0.0)
    f = a
    if MOMENTUM:
        f = tl.load(F + cell * L + query, mask=query < L, other=0.0)
    pair = (query < L)[:, None] & (token < L)[None, :]
    g = tl.load(G + cell * L * L + query[:, None] * L + token[None, :], mask=pair, other=0.0)
    return a[:, None], f[:, None], g


@triton.jit(do_not_specialize=["n"])
def read_kernel(
    q,
    A,
    F,
    G,
    hidden_starts,
    last_starts,
    keys,
    inputs,
    hidden_deltas,
    last_deltas,
    y,
    n,
    D: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Names as in ``scan_kernel``; programs are (chunk of a head, tile of its tokens)."""
    p = tl.program_id(0).to(tl.int64)  # of a head's chunk
    SIZE: tl.constexpr = D * H
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    DEPTH: tl.constexpr = 2 if DEEP else 1
    query = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    asked = (query < L)[:, None]
    stored = (token < L)[:, None]
    start = p * PARTS * SIZE
    base = p * L
    last_cell = ((p // n) * DEPTH + DEPTH - 1) * n + p % n

    at_query = query[:, None] * D + d[None, :]
    qt = tl.load(q + base * D + at_query, mask=asked, other=0.0)
    kt = tl.load(keys + base * D + token[:, None] * D + d[None, :], mask=stored, other=0.0).to(qt.dtype)
    scores = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    a, f, g = _decay(A, F, G, last_cell, query, token, L, MOMENTUM)
    if DEEP:
        hidden_cell = (p // n) * DEPTH * n + p % n
        ha, hf, hg = _decay(A, F, G, hidden_cell, query, token, L, MOMENTUM)
        own = (scores * hg).to(qt.dtype)
        scores = tl.zeros([TILE, ROWS], tl.float32)
        z = tl.zeros([TILE, D], tl.float32)
        past = tl.zeros([TILE, D], tl.float32)
        for b in range(0, H, BLOCK):
            hb = b + tl.arange(0, BLOCK)
            part = token[:, None] * H + hb[None, :]
            at = hb[:, None] * D + d[None, :]
            hidden = tl.load(hidden_starts + start + at).to(qt.dtype)
            x = ha * tl.dot(qt, tl.trans(hidden), input_precision=PRECISION)
            if MOMENTUM:
                hidden = tl.load(hidden_starts + start + SIZE + at).to(qt.dtype)
                x += hf * tl.dot(qt, tl.trans(hidden), input_precision=PRECISION)
            back = tl.load(hidden_deltas + base * H + part, mask=stored, other=0.0).to(qt.dtype)
            x -= tl.dot(own, back, input_precision=PRECISION)
            x, _ = gelu(x)
            xt = x.to(qt.dtype)
            at = d[:, None] * H + hb[None, :]
            last = tl.load(last_starts + start + at).to(qt.dtype)
            z = tl.dot(xt, tl.trans(last), z, input_precision=PRECISION)
            if MOMENTUM:
                last = tl.load(last_starts + start + SIZE + at).to(qt.dtype)
                past = tl.dot(xt, tl.trans(last), past, input_precision=PRECISION)
            stores = tl.load(inputs + base * H + part, mask=stored, other=0.0).to(qt.dtype)
            scores = tl.dot(xt, tl.trans(stores), scores, input_precision=PRECISION)
    else:
        at = d[:, None] * H + d[None, :]
        last = tl.load(last_starts + start + at).to(qt.dtype)
        z = tl.dot(qt, tl.trans(last), input_precision=PRECISION)
        past = z
        if MOMENTUM:
            last = tl.load(last_starts + start + SIZE + at).to(qt.dtype)
            past = tl.dot(qt, tl.trans(last), input_precision=PRECISION)
    z *= a
    if MOMENTUM:
        z += f * past
    delta = tl.load(last_deltas + base * D + token[:, None] * D + d[None, :], mask=stored, other=0.0).to(
        qt.dtype
    )
    z -= tl.dot((scores * g).to(qt.dtype), delta, input_precision=PRECISION)
    tl.store(y + base * D + at_query, finish(z, qt.to(tl.float32), D, RESIDUAL, NORM), mask=asked)


def read(q: Tensor, decay: Decays, scanned: Scan, rule: MemoryRule) -> Tensor:
    """``chunk.read`` for what ``support.missing`` has nothing against; no gradients."""
    B, H, n, L, d = q.shape
    starts, deltas = ([x.contiguous() for x in tensors] for tensors in (scanned.starts, scanned.deltas))
    depth, width = len(starts), starts[-1].shape[-1]
    rows = triton.next_power_of_2(L)
    tile = min(rows, 64)
    y = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    read_kernel[(B * H * n, triton.cdiv(L, tile))](
        q.contiguous(),
        decay.A.contiguous(),
        (decay.A if decay.past is None else decay.past.F).contiguous(),
        decay.G.contiguous(),
        starts[0],
        starts[-1],
        scanned.inputs[0].contiguous(),
        scanned.inputs[-1].contiguous(),
        deltas[0],
        deltas[-1],
        y,
        n,
        D=d,
        H=width,
        L=L,
        ROWS=rows,
        TILE=tile,
        DEEP=depth > 1,
        MOMENTUM=rule.algorithm.momentum,
        RESIDUAL=rule.architecture.residual,
        NORM=rule.architecture.norm,
        PRECISION=PRECISIONS[q.dtype],
        **launch(width, q.dtype),
    )
    return y


def launch(width: int, operands: torch.dtype) -> dict[str, int]:
    """Of shapes and types alone, so that bits don't depend on load."""
    return {"BLOCK": min(width, 64), "num_warps": 4, "num_stages": 2 if operands == torch.bfloat16 else 1}
