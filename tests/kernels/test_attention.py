"""Attention in masked blocks against one dense attention, and what rotary positions promise."""

from __future__ import annotations

import math

import pytest
import torch

from mnemosyne.kernels.attention import segment_block, window_blocks
from mnemosyne.kernels.positions import causal_conv, rotary_angles, rotate

H, D, P, BLOCK = 2, 8, 3, 4


def dense(q, k, v, persistent_k, persistent_v, seen):
    """q `[H, T, D]`, keys `[H, S, D]`, ``seen`` `[T, S]`."""
    scores = torch.cat([q @ persistent_k.transpose(1, 2), q @ k.transpose(1, 2)], -1) / math.sqrt(D)
    mask = torch.cat([torch.ones(len(seen), P, dtype=torch.bool), seen], 1)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return weights @ torch.cat([persistent_v, v], 1)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(len(shape) + shape[-2]), dtype=torch.float64
    )


@pytest.mark.parametrize("first", [0, 8, 400])
@pytest.mark.parametrize("window", [4, 12])
def test_window_blocks(window, first):
    T = 12
    q, k, v = normal(H, T, D), normal(H, window + T, D), normal(H, window + T, D)
    pk, pv = normal(H, P, D), normal(H, P, D)
    # What stands before position 0 must not matter, as long as it is finite.
    k[:, : max(0, window - first)] = 1e6
    got = window_blocks(q[None], k[None], v[None], pk, pv, torch.tensor([first]), BLOCK)[0]
    absolute_q = first + torch.arange(T)[:, None]
    absolute_k = first - window + torch.arange(window + T)[None]
    seen = (absolute_k >= 0) & (absolute_k <= absolute_q) & (absolute_k > absolute_q - window)
    assert torch.allclose(got, dense(q, k, v, pk, pv, seen), atol=1e-12)


def test_segment_block():
    C, offset = 12, 4
    q, pk, pv = normal(H, BLOCK, D), normal(H, P, D), normal(H, P, D)
    xk, xv, hk, hv = normal(H, C, D), normal(H, C, D) + 1, normal(H, C, D) + 2, normal(H, C, D) + 3
    got = segment_block(q[None], (hk[None], xk[None]), (hv[None], xv[None]), pk, pv, torch.tensor([offset]))[
        0
    ]
    causal = torch.arange(C)[None] <= offset + torch.arange(BLOCK)[:, None]
    expected = dense(
        q, torch.cat([hk, xk], 1), torch.cat([hv, xv], 1), pk, pv, torch.cat([causal, causal], 1)
    )
    assert torch.allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("far", [1_000, 10_000_000, 4_000_000_000])
def test_rotary_depends_on_distance_alone(far):
    q, k = normal(1, D).float(), normal(2, D)[:1].float()

    def score(position: int) -> float:
        angles = [
            rotary_angles(torch.tensor([p]), D, 10_000.0, torch.float32) for p in (position + 5, position)
        ]
        return float((rotate(q, *angles[0]) * rotate(k, *angles[1])).sum())

    assert abs(score(far) - score(0)) < 1e-5


def test_causal_conv_is_the_same_for_any_split():
    x, weight = normal(1, 3 + 20, 6).float(), normal(4, 6).float()
    whole = causal_conv(x, weight)
    parts = [causal_conv(x[:, a : b + 3], weight) for a, b in ((0, 1), (1, 8), (8, 20))]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.allclose(whole[0, 0], (x[0, :4] * weight).sum(0), atol=1e-6)
