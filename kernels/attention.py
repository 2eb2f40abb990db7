"""Attention over a window or a segment, in blocks of one chunk with a fixed, masked key length.

Every query block has the same shapes wherever it stands, so a token's bits don't depend on how its text was
split. Knows no module, no rotary position and no cache policy. q, k, v are `[B, H, T, d]`, rotated already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    persistent_k: Tensor,
    persistent_v: Tensor,
    start: Tensor,
    block: int,
) -> Tensor:
    """Each token over the persistent tokens and the last W tokens, its own included; `[B, H, T, d]`.

    ``k``, ``v`` `[B, H, W + T, d]` begin with the W tokens before the queries'; ``persistent_*`` `[H, P, d]`;
    ``start`` `[B]` is the absolute position of the first query: keys before position 0 are masked.
    T is a multiple of ``block``, and so is W.
    """
    if _trains_on_device(q, k, block):
        from mnemosyne.kernels.triton.train_window import window_blocks as train

        return train(q, k, v, persistent_k, persistent_v, start, block)
    B, H, T, d = q.shape
    W, n, P = k.shape[2] - T, T // block, persistent_k.shape[1]

    def blocks(x: Tensor, persistent: Tensor) -> Tensor:
        view = x.unfold(2, W + block, block).permute(0, 2, 1, 4, 3)
        return torch.cat([persistent.to(x.dtype).expand(B, n, H, P, d), view], 3).reshape(
            B * n, H, P + W + block, d
        )

    mask = window_mask(start, n, block, W, P)
    y = F.scaled_dot_product_attention(
        q.view(B, H, n, block, d).transpose(1, 2).reshape(B * n, H, block, d),
        blocks(k, persistent_k),
        blocks(v, persistent_v),
        attn_mask=mask.reshape(B * n, 1, block, P + W + block),
    )
    return y.view(B, n, H, block, d).transpose(1, 2).reshape(B, H, T, d)


def _trains_on_device(q: Tensor, k: Tensor, block: int) -> bool:
    """Whether the differentiable kernels attend to a window: on a GPU, with gradients."""
    if not q.is_cuda or not torch.is_grad_enabled():
        return False
    from mnemosyne.kernels.triton import train_support

    return train_support.attends(q, k, block)


def window_mask(start: Tensor, n: int, block: int, window: int, persistent: int) -> Tensor:
    """`[B, n, block, persistent + window + block]`, True where a query of block i may look."""
    row = torch.arange(block, device=start.device)
    column = torch.arange(window + block, device=start.device)
    distance = row[:, None] + window - column[None, :]
    band = (distance >= 0) & (distance < window)
    first = start[:, None] + block * torch.arange(n, device=start.device)[None, :]
    exists = first[..., None] - window + column >= 0
    seen = band & exists[:, :, None, :]
    return torch.cat([torch.ones_like(seen[..., :1]).expand(*seen.shape[:-1], persistent), seen], -1)


def segment_block(
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    persistent_k: Tensor,
    persistent_v: Tensor,
    offset: Tensor,
) -> Tensor:
    """MAC: queries at segment positions ``offset[b] + i`` over [p, h_1..h_i, x_1..x_i]; `[B, H, L, d]`.

    ``keys``, ``values`` are the segment's buffers for h and for x, `[B, H, C, d]` each; rows past a query's
    own position are masked, so what stands in them doesn't matter as long as it is finite.
    """
    B, H, L, d = q.shape
    P, C = persistent_k.shape[1], keys[0].shape[2]
    position = offset[:, None] + torch.arange(L, device=q.device)
    causal = position[:, :, None] >= torch.arange(C, device=q.device)
    mask = torch.cat([torch.ones(B, L, P, dtype=torch.bool, device=q.device), causal, causal], -1)
    k = torch.cat([persistent_k.to(q.dtype).expand(B, H, P, d), *keys], 2)
    v = torch.cat([persistent_v.to(q.dtype).expand(B, H, P, d), *values], 2)
    if L == 1:
        return one_row(q, k, v, mask[:, 0])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


def one_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query a session: q `[B, H, 1, d]`, k and v `[B, H, S, d]`, ``mask`` `[B, S]`; `[B, H, 1, d]`.

    Written out, since the library's CPU kernel divides a single row among threads by the batch's size.
    """
    B, H, S, d = k.shape
    scores = torch.bmm(q.reshape(B * H, 1, d), k.reshape(B * H, S, d).transpose(1, 2)).view(B, H, 1, S)
    scores = (scores.to(torch.promote_types(q.dtype, torch.float32)) * d**-0.5).masked_fill(
        ~mask[:, None, None], float("-inf")
    )
    weights = torch.softmax(scores, -1).to(v.dtype)
    return torch.bmm(weights.view(B * H, 1, S), v.reshape(B * H, S, d)).view(B, H, 1, d)
