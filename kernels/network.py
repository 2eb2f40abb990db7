"""The memory network: forward, and the per-token factors of its inner gradient. Knows no gate, no chunk.

M(x) = [x +] [LN](W_L act(... act(W_1 x))), weights `[N, out, in]`, tokens are rows `[N, L, d]`; N is batch
times heads. Titans (NeurIPS text) 3.3; the factors are the two sides of each rank-one gradient
(spec/memory.md 1, 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnemosyne.kernels import elementwise
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule

NORM_EPSILON = 1e-6
TINY = 1e-15


def activation(z: Tensor) -> Tensor:
    return elementwise.gelu(z)


def activation_backward(gradient: Tensor, z: Tensor) -> Tensor:
    """gradient * act'(z)."""
    return elementwise.gelu_backward(gradient, z)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, eps inside the root: a vector of zero norm stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON)


def normalize(z: Tensor) -> tuple[Tensor, Tensor]:
    """Layer norm without affine part over the last dimension; also 1/std `[..., 1]`."""
    centred = z - z.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPSILON)
    return centred * rstd, rstd


def finish(z: Tensor, x: Tensor, architecture: Architecture) -> Tensor:
    """From the last product to M(x)."""
    if architecture.norm:
        z = normalize(z)[0]
    return x + z if architecture.residual else z


def retrieve(weights: Sequence[Tensor], x: Tensor, architecture: Architecture) -> Tensor:
    """M(x) `[N, L, d]` (Titans eq. 15)."""
    a = x
    for i, weight in enumerate(weights):
        z = torch.bmm(a, weight.transpose(1, 2))
        a = activation(z) if i + 1 < len(weights) else z
    return finish(a, x, architecture)


class Factors(NamedTuple):
    """The gradient of a token's inner loss for W_l is deltas[l] times inputs[l] transposed."""

    inputs: list[Tensor]
    """Per memory layer `[N, L, in]`."""
    deltas: list[Tensor]
    """Per memory layer `[N, L, out]`, clipped where a clip is set."""
    norms: Tensor
    """`[N, depth, L]`: norm of each gradient before clipping."""
    rstd: Tensor | None
    """`[N, L]`: 1 / std of what the norm of M(k) was taken of, where there is one."""


def gradient_factors(
    weights: Sequence[Tensor], k: Tensor, v: Tensor, threshold: Tensor | None, rule: MemoryRule
) -> Factors:
    """Forward and backward of the inner loss at ``weights`` for keys and values `[N, L, d]`, thresholds
    `[N, L]`."""
    inputs, zs = [k], []
    for i, weight in enumerate(weights):
        z = torch.bmm(inputs[-1], weight.transpose(1, 2))
        zs.append(z)
        if i + 1 < len(weights):
            inputs.append(activation(z))
    out = zs[-1]
    rstd = None
    if rule.architecture.norm:
        out, rstd = normalize(out)
    delta = rule.bias.gradient(out + k if rule.architecture.residual else out, v, threshold)
    if rstd is not None:
        centred = delta - delta.mean(-1, keepdim=True)
        delta = rstd * (centred - out * (delta * out).mean(-1, keepdim=True))
    deltas = [delta]
    for i in range(len(weights) - 1, 0, -1):
        delta = activation_backward(torch.bmm(delta, weights[i]), zs[i - 1])
        deltas.insert(0, delta)
    norms = torch.stack(
        [
            torch.linalg.vector_norm(d, dim=-1) * torch.linalg.vector_norm(a, dim=-1)
            for d, a in zip(deltas, inputs, strict=True)
        ],
        dim=1,
    )
    clip = rule.algorithm.clip
    if clip is not None:
        factor = (clip / norms.clamp(min=TINY)).clamp(max=1.0)
        deltas = [d * factor[:, i].unsqueeze(-1) for i, d in enumerate(deltas)]
    return Factors(inputs, deltas, norms, None if rstd is None else rstd.squeeze(-1))
