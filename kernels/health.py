"""How much a chunk amplifies a disturbance of the memory. Owns that one number; knows no module, no session.

A chunk's fold takes the last memory layer's weights W to A W - sum_j w_j delta_j(W) a_j^T. Two memories that
differ a little by dW differ after it by dW (A - K), with K = sum_j w_j c_j a_j a_j^T and c_j the curvature of
token j's loss before the norm: 2 / std_j^2 for a square loss. Where K's eigenvalues are below 1 + A every
such difference shrinks; beyond it one overshoots and grows, chunk after chunk. Then no two implementations,
precisions or splits stay together (docs/experiments/chaos.md).

Of the eigenvalues it takes their mean, each weighted by itself: sum of their squares over their sum. That is
between their plain mean and the largest, needs none of them, and told growing memories from quiet ones better
than the largest did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnemosyne.kernels.chunk import Scan
from mnemosyne.kernels.gates import Decays
from mnemosyne.kernels.rules.rule import MemoryRule

TINY = 1e-30


def gain(scanned: Scan, decay: Decays, rule: MemoryRule) -> Tensor:
    """K's mean eigenvalue over 1 + A, `[B, H, n]`: below 1 differences shrink, above it some grow.

    To first order, of the last memory layer, and without what momentum carries into the next chunk.
    """
    start, a = scanned.starts[-1][:, :, :, 0], scanned.inputs[-1]
    B, H, n, L, inn = a.shape
    norms = scanned.norms[:, :, -1]
    raw = norms / torch.linalg.vector_norm(a, dim=-1).clamp(min=TINY)  # |delta| before clipping
    if scanned.rstd is None:
        curvature = rule.bias.curvature(raw)
    else:
        curvature = rule.bias.curvature(raw / scanned.rstd) * scanned.rstd.square()
    if rule.algorithm.clip is not None:
        curvature = curvature * (rule.algorithm.clip / norms.clamp(min=TINY)).clamp(max=1.0)
    weight = decay.G[:, :, -1, :, -1] * curvature
    rows = (a * weight.sqrt().unsqueeze(-1)).view(-1, L, inn)
    gram = torch.bmm(rows, rows.transpose(1, 2))
    trace = gram.diagonal(dim1=1, dim2=2).sum(-1)
    found = torch.linalg.vector_norm(gram.flatten(1), dim=-1).square() / trace.clamp(min=TINY)
    slope = rule.retention.slope(start.flatten(0, 2))
    if slope is not None:
        found = found * slope
    return found.view(B, H, n) / (1 + decay.A[:, :, -1, :, -1])
