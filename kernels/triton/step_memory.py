"""One token a session stored and read in its memory, on top of what stands at the chunk's start. Counterpart
of ``decode.step``, of the convolution before it, and of the norm per head and the output gate after it.

A program takes one head. It reads each matrix of M and S once: the first layer's in blocks of hidden units,
which go by; the last layer's M stays in registers, because the loss goes forward and back through it before
the read can be made. Everything is fp32 but momentum and what lies in the open chunk. Nothing is formed
that is a matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.kernels.triton import step_memory_resident
from mnemosyne.kernels.triton.cell_gates import gate
from mnemosyne.kernels.triton.cells import located
from mnemosyne.kernels.triton.network import TINY, finish, gelu, output_delta
from mnemosyne.kernels.triton.recall import head_norm
from mnemosyne.kernels.triton.step_table import (
    INDEX,
    OPEN,
    STATE,
    Streams,
    begin,
    convolved,
    shift,
    step_field,
    tails_of,
)


class GateLimits(NamedTuple):
    theta: float
    """The largest, as the two below."""
    eta: float
    alpha: float
    epsilon: float


class StepPlaces(NamedTuple):
    """Byte offsets of one layer's tensors; pairs are of the first memory layer and the last."""

    tails: tuple[int, int]
    """In the state, and in the open chunk."""
    memory: tuple[int, int]
    momentum: tuple[int, int]
    inputs: tuple[int, int]
    """In the open chunk, as what follows."""
    deltas: tuple[int, int]
    decay: int
    rows: int


@triton.jit
def _extended(
    logits, decay, rows, gated, index, theta_max, eta_max, alpha_max, epsilon,
    GATES: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Take the token into A, F, E and the rows of G and P of a memory layer, in place; its A, F and theta."""
    theta = gate(tl.load(logits + gated), theta_max, epsilon)
    eta = gate(tl.load(logits + GATES + gated), eta_max, epsilon)
    keep = 1.0 - gate(tl.load(logits + 2 * GATES + gated), alpha_max, epsilon)
    begun = index > 0
    A = keep * tl.load(decay + gated, mask=begun, other=1.0)
    F = keep * tl.load(decay + GATES + gated, mask=begun, other=0.0)
    E = eta * tl.load(decay + 2 * GATES + gated, mask=begun, other=1.0)
    F += E
    j = tl.arange(0, ROWS)
    of_g = rows + gated * L + j
    of_p = of_g + GATES * L
    P = eta * tl.load(of_p, mask=j < index, other=0.0)
    G = keep * tl.load(of_g, mask=j < index, other=0.0) + P
    tl.debug_barrier()  # every thread has read what is overwritten
    tl.store(decay + gated, A)
    tl.store(decay + GATES + gated, F)
    tl.store(decay + 2 * GATES + gated, E)
    tl.store(of_p, tl.where(j == index, theta, P), mask=j <= index)
    tl.store(of_g, tl.where(j == index, theta, G), mask=j <= index)
    return A, F, theta


@triton.jit
def _stored(
    x, inputs, deltas, weights, index,
    IN: tl.constexpr, OUT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the chunk's earlier tokens stored, read at ``x`` `[IN]`: sum of G_j (a_j x) delta_j, `[OUT]`."""
    t = tl.arange(0, TILE)
    i = tl.arange(0, IN)
    o = tl.arange(0, OUT)
    total = tl.zeros([TILE, OUT], tl.float32)
    for j in tl.range(0, index, TILE, num_stages=STAGES):
        here = j + t < index
        a = tl.load(inputs + (j + t)[:, None] * IN + i[None, :], mask=here[:, None], other=0.0)
        delta = tl.load(deltas + (j + t)[:, None] * OUT + o[None, :], mask=here[:, None], other=0.0)
        weight = tl.load(weights + j + t, mask=here, other=0.0)
        weight *= tl.sum(a.to(tl.float32) * x[None, :], 1)
        total += delta.to(tl.float32) * weight[:, None]
    return tl.sum(total, 0)


@triton.jit
def _clipped(delta, square, clip, CLIP: tl.constexpr):
    """A gradient's delta, where the gradient has the norm sqrt(``square``)."""
    if CLIP:
        delta *= tl.minimum(clip / tl.maximum(tl.sqrt(square), TINY), 1.0)
    return delta


@triton.jit(do_not_specialize=["count"])
def step_memory_kernel(
    x,
    logits,
    out,
    norm,
    taps,
    scratch,
    table,
    count,
    N,
    q_column,
    k_column,
    v_column,
    q_channel,
    k_channel,
    v_channel,
    gate_column,
    tails_state,
    tails_open,
    hidden_m,
    last_m,
    hidden_s,
    last_s,
    keys_offset,
    inputs_offset,
    hidden_deltas_offset,
    last_deltas_offset,
    decay_offset,
    rows_offset,
    theta_max,
    eta_max,
    alpha_max,
    gate_epsilon,
    clip,
    epsilon,
    GATES: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    DEEP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Programs are (session, head); ``scratch`` has 2 H + D numbers for each."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    own = step_field(table, OPEN, row, count)
    state = step_field(table, STATE, row, count)
    index = step_field(table, INDEX, row, count).to(tl.int32)
    begin()
    if own == 0:
        return
    SIZE: tl.constexpr = D * H
    KIND: tl.constexpr = x.dtype.element_ty
    DEPTH: tl.constexpr = 2 if DEEP else 1
    d = tl.arange(0, D)
    h = tl.arange(0, H)

    tails = tails_of(table, row, count, tails_state, tails_open, KIND) + head * D
    kept = located(own, tails_open, KIND) + head * D
    new = x + row * N + head * D
    taps += head * D
    q = convolved(new + q_column, tails + q_channel, taps + q_channel, CHANNELS, K, D, True)
    k = convolved(new + k_column, tails + k_channel, taps + k_channel, CHANNELS, K, D, True)
    v = convolved(new + v_column, tails + v_channel, taps + v_channel, CHANNELS, K, D, False)
    # Few numbers a layer: not ``located``, whose 16 bytes they don't keep to.
    decay = (own + decay_offset).to(tl.pointer_type(tl.float32))
    rows = located(own, rows_offset, tl.float32)
    logits += row * GATES
    gated = head * DEPTH
    if DEEP:
        hidden_a, hidden_f, hidden_theta = _extended(
            logits, decay, rows, gated, index,
            theta_max, eta_max, alpha_max, gate_epsilon, HEADS * DEPTH, L, ROWS,
        )  # fmt: skip
    last_a, last_f, last_theta = _extended(
        logits, decay, rows, gated + DEPTH - 1, index,
        theta_max, eta_max, alpha_max, gate_epsilon, HEADS * DEPTH, L, ROWS,
    )  # fmt: skip
    # The barriers there are behind every read of the tails.
    shift(new + q_column, tails + q_channel, kept + q_channel, CHANNELS, K, D)
    shift(new + k_column, tails + k_channel, kept + k_channel, CHANNELS, K, D)
    shift(new + v_column, tails + v_channel, kept + v_channel, CHANNELS, K, D)

    scratch += (row * HEADS + head) * (2 * H + D)
    if DEEP:
        m_start = located(state, hidden_m, tl.float32) + head * SIZE
        s_start = located(state, hidden_s, KIND) + head * SIZE
        for b in tl.range(0, H, BLOCK, num_stages=STAGES):
            hb = b + tl.arange(0, BLOCK)
            m = tl.load(m_start + hb[:, None] * D + d[None, :])
            s = tl.load(s_start + hb[:, None] * D + d[None, :]).to(tl.float32)
            tl.store(scratch + hb, tl.sum(m * k[None, :], 1))
            tl.store(scratch + H + hb, tl.sum((hidden_a * m + hidden_f * s) * q[None, :], 1))
    last = tl.load(located(state, last_m, tl.float32) + head * SIZE + d[:, None] * H + h[None, :])
    tl.debug_barrier()  # what was stored, the rows of G among it, comes back
    a = k
    if DEEP:
        a, slope = gelu(tl.load(scratch + h))
    z = tl.sum(last * a[None, :], 1)
    delta, _ = output_delta(z[None, :], k[None, :], v[None, :], 0.0, D, RESIDUAL, NORM, False)
    delta = tl.reshape(delta, [D])
    keys = located(own, keys_offset, KIND) + head * L * D
    deltas = located(own, last_deltas_offset, KIND) + head * L * D
    tl.store(keys + index * D + d, k)
    stood = q
    if DEEP:
        back = tl.sum(last * delta[:, None], 0) * slope
        back = _clipped(back, tl.sum(back * back, 0) * tl.sum(k * k, 0), clip, CLIP)
        inputs = located(own, inputs_offset, KIND) + head * L * H
        hidden_deltas = located(own, hidden_deltas_offset, KIND) + head * L * H
        tl.store(inputs + index * H + h, a)
        tl.store(hidden_deltas + index * H + h, back)
        stood = tl.load(scratch + H + h)
        stood -= _stored(q, keys, hidden_deltas, rows + gated * L, index, D, H, TILE, STAGES)
        stood -= hidden_theta * tl.sum(k * q, 0) * back
        stood, _ = gelu(stood)
    else:
        inputs = keys
    delta = _clipped(delta, tl.sum(delta * delta, 0) * tl.sum(a * a, 0), clip, CLIP)
    tl.store(deltas + index * D + d, delta)

    s_start = located(state, last_s, KIND) + head * SIZE
    for b in tl.range(0, D, SLICE, num_stages=STAGES):
        db = b + tl.arange(0, SLICE)
        s = tl.load(s_start + db[:, None] * H + h[None, :]).to(tl.float32)
        tl.store(scratch + 2 * H + db, tl.sum(s * stood[None, :], 1))
    z = last_a * tl.sum(last * stood[None, :], 1)
    z -= _stored(stood, inputs, deltas, rows + (gated + DEPTH - 1) * L, index, H, D, TILE, STAGES)
    z -= last_theta * tl.sum(a * stood, 0) * delta
    tl.debug_barrier()
    z += last_f * tl.load(scratch + 2 * H + d)
    y = finish(z[None, :], q[None, :], D, RESIDUAL, NORM)
    y = head_norm(y, tl.load(norm + d), D, epsilon)
    opened = tl.load(new + gate_column + d).to(tl.float32)[None, :]
    tl.store(out + row * (HEADS * D) + head * D + d[None, :], y / (1.0 + tl.exp(-opened)))


def step_memory(
    x: Tensor,
    streams: Streams,
    gate_column: int,
    logits: Tensor,
    out: Tensor,
    norm: Tensor,
    taps: Tensor,
    scratch: Tensor,
    table: Tensor,
    places: StepPlaces,
    limits: GateLimits,
    depth: int,
    width: int,
    chunk: int,
    architecture: Architecture,
    clip: float | None,
    epsilon: float,
) -> None:
    """``out`` `[sessions, dim]`: each token stored in its chunk, and what is read after it, normed per head,
    times the output gate.

    ``x`` `[sessions, N]` has the ``streams`` and, at ``gate_column``, the output gate; ``logits`` fp32
    `[sessions, G]` of theta, eta and alpha (heads, then memory layers); ``norm`` `[D]`, ``taps``
    `[K, S dim]`; ``scratch`` fp32 `[sessions, H, 2 width + D]`; ``depth`` 1 or 2, ``width`` hidden units
    (head_dim at 1).
    """
    head_dim = norm.shape[0]
    heads = out.shape[1] // head_dim
    numbers = (
        table,
        table.shape[1],
        x.shape[1],
        *streams.columns,
        *streams.channels,
        gate_column,
        *places.tails,
        *places.memory,
        *places.momentum,
        *places.inputs,
        *places.deltas,
        places.decay,
        places.rows,
        limits.theta,
        limits.eta,
        limits.alpha,
        limits.epsilon,
        clip or 0.0,
        epsilon,
    )
    form = {
        "HEADS": heads,
        "CHANNELS": taps.shape[1],
        "RESIDUAL": architecture.residual,
        "NORM": architecture.norm,
        "CLIP": clip is not None,
    }
    grid = (table.shape[1], heads)
    if step_memory_resident.serves(x.dtype, depth, head_dim, width, chunk, taps.shape[0]):
        step_memory_resident.resident_memory_kernel[grid](
            x,
            logits,
            out,
            norm,
            taps,
            *numbers,
            LOGITS=logits.shape[1],
            num_warps=step_memory_resident.WARPS,
            maxnreg=step_memory_resident.registers(table.shape[1] * heads),
            launch_pdl=True,
            **form,
        )
        return
    step_memory_kernel[grid](
        x,
        logits,
        out,
        norm,
        taps,
        scratch,
        *numbers,
        GATES=logits.shape[1],
        K=taps.shape[0],
        D=head_dim,
        H=width,
        L=chunk,
        ROWS=triton.next_power_of_2(chunk),
        DEEP=depth > 1,
        launch_pdl=True,
        **form,
        **launch(head_dim, width),
    )


def launch(head_dim: int, width: int) -> dict[str, int]:
    """Of shapes alone, so that bits don't depend on load. Two programs of eight warps share a
    multiprocessor's registers, so that one reads while the other waits at a barrier; what that spills stays
    in its cache."""
    large = {"num_warps": 8, "maxnreg": 128} if head_dim * width >= 8192 else {"num_warps": 4}
    return {"BLOCK": min(width, 64), "SLICE": min(head_dim, 32), "TILE": 16, "STAGES": 3, **large}
