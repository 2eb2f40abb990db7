"""The memory network's part of the outer gradient: back through the clipping of a token's inner gradient, its
two norms, and the layer norm. Counterpart of ``network`` beside this file; tiles have tokens as rows. Knows
no memory address."""

from __future__ import annotations

import triton
import triton.language as tl

from mnemosyne.kernels.triton.network import TINY, clip_factor, length


@triton.jit
def through_clip(g_delta, delta, norm, g_norm, k_norm, clip, CLIP: tl.constexpr):
    """From the gradients of a clipped ``delta`` `[L, D]` and of ``norm`` = |e| |k| `[L]` before clipping to
    those of e, of which delta is made, and of |k|; e itself besides."""
    e = delta
    g_e = g_delta
    if CLIP:
        factor = clip_factor(norm, clip)
        e = delta / factor[:, None]
        bounded = tl.maximum(norm, TINY)
        active = (norm >= TINY) & (clip / bounded <= 1.0)
        g_norm -= tl.where(active, factor / bounded * tl.sum(g_delta * e, 1), 0.0)
        g_e = g_delta * factor[:, None]
    e_norm = length(e)
    along = tl.where(e_norm > 0.0, g_norm * k_norm / tl.where(e_norm > 0.0, e_norm, 1.0), 0.0)
    return g_e + along[:, None] * e, g_norm * e_norm, e


@triton.jit
def through_norm(g_e, e, out, rstd, g_rstd, g, WIDTH: tl.constexpr):
    """From the gradient of e = rstd (g - mean g - out mean(g out)), where ``out`` `[L, D]` is the layer norm
    of z and ``g`` the slope of the loss in it, to the gradients of g, directly, and of out; see
    ``through_moments``. Also rstd's `[L]`."""
    g_rstd += tl.sum(g_e * e, 1) / rstd
    g_p = rstd[:, None] * g_e
    mean = tl.sum(g * out, 1) / WIDTH
    g_mean = tl.sum(g_p * out, 1) / WIDTH
    g_g = g_p - (tl.sum(g_p, 1) / WIDTH)[:, None] - out * g_mean[:, None]
    return g_g, -g_p * mean[:, None] - g * g_mean[:, None], g_rstd


@triton.jit
def through_moments(g_out, out, rstd, g_rstd, WIDTH: tl.constexpr):
    """From the gradients of ``out`` `[L, D]`, the layer norm of z, and of its 1/std `[L]` to that of z."""
    g_rstd += tl.sum(g_out * out, 1) / rstd
    g_z = rstd[:, None] * g_out - out * (rstd * rstd * g_rstd / WIDTH)[:, None]
    return g_z - (tl.sum(g_z, 1) / WIDTH)[:, None]
