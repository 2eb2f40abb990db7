"""The memory network on the device: GELU, layer norm, the slope of the inner loss. Counterpart of
``kernels.network``; tiles have tokens as rows. Knows no memory address."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPSILON: tl.constexpr = tl.constexpr(1e-6)
TINY: tl.constexpr = tl.constexpr(1e-15)


@triton.jit
def gelu(z, ROUGH: tl.constexpr = False):
    """GELU in its tanh form, and its derivative. ROUGH: tanh by the instruction, 2^-11 from the truth, for
    what is rounded to bf16 afterwards."""
    scale: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
    cubic: tl.constexpr = 0.044715
    square = z * z
    inner = scale * z * (1.0 + cubic * square)
    if ROUGH:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner))
    half = 0.5 * (1.0 + tanh)
    return z * half, half + 0.5 * z * (1.0 - tanh * tanh) * scale * (1.0 + 3.0 * cubic * square)


@triton.jit
def normalize(z, WIDTH: tl.constexpr):
    """Layer norm of rows, and 1/std."""
    centred = z - (tl.sum(z, 1) / WIDTH)[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + NORM_EPSILON)
    return centred * rstd[:, None], rstd


@triton.jit
def finish(z, x, WIDTH: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr):
    """From the last product to M(x)."""
    if NORM:
        z, _ = normalize(z, WIDTH)
    if RESIDUAL:
        z += x
    return z


@triton.jit
def output_delta(
    z,
    k,
    v,
    threshold,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    HUBER: tl.constexpr,
):
    """Gradient of the inner loss, square or Huber's, with respect to the last product ``z``; and 1/std."""
    out = z
    rstd = threshold
    if NORM:
        out, rstd = normalize(z, WIDTH)
    error = out - v
    if RESIDUAL:
        error += k
    delta = 2.0 * error
    if HUBER:
        norm = tl.sqrt(tl.sum(error * error, 1))
        delta *= tl.minimum(threshold / tl.maximum(norm, TINY), 1.0)[:, None]
    if NORM:
        delta -= (tl.sum(delta, 1) / WIDTH)[:, None] + out * (tl.sum(delta * out, 1) / WIDTH)[:, None]
        delta *= rstd[:, None]
    return delta, rstd


@triton.jit
def clip_factor(norm, clip):
    """By which a gradient of this norm is scaled to at most ``clip``."""
    return tl.minimum(clip / tl.maximum(norm, TINY), 1.0)


@triton.jit
def length(x):
    """Norm of each row."""
    return tl.sqrt(tl.sum(x * x, 1))
