"""What reading did to the memory: surprise, movement, share written (spec/memory.md 5). Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.engine.memory import Learned


@dataclass(frozen=True)
class Trace:
    """Per session and committed chunk, `[B][n]` each: means over layers, heads and the chunk's tokens."""

    surprise: list[list[float]]
    """Norm of the whole inner gradient of a token, before clipping."""
    momentary: list[list[float]]
    """The same, each memory layer's part times its theta."""
    moved: list[list[float]]
    """||M_after - M_before|| / ||M_before||."""
    written: list[list[float]]
    """Share of (layer, head, memory layer) cells that the chunk changed."""


def measure(learned: Learned) -> Tensor:
    """`[4, B, n]` of one layer, in the order of Trace's fields."""
    norms, theta = learned.scan.norms, learned.gates[0]
    square = norms.square()
    surprise = square.sum(2).sqrt().mean((1, 3))
    momentary = (square * theta.square()).sum(2).sqrt().mean((1, 3))
    moved, before, cells = [], [], []
    for start, final in zip(learned.scan.starts, learned.scan.memory, strict=True):
        M = start[:, :, :, 0]
        after = torch.cat([M[:, :, 1:], final.unsqueeze(2)], 2)
        step = (after - M).square().sum((3, 4))
        moved.append(step.sum(1))
        before.append(M.square().sum((1, 3, 4)))
        cells.append((step > 0).to(step.dtype).mean(1))
    ratio = torch.stack(moved).sum(0).sqrt() / torch.stack(before).sum(0).clamp(min=1e-30).sqrt()
    return torch.stack([surprise, momentary, ratio, torch.stack(cells).mean(0)])


def summarize(layers: Sequence[Sequence[Learned]]) -> Trace:
    """From what each layer learned over the same chunks."""
    per_layer = [torch.cat([measure(part) for part in history], 2) for history in layers]
    mean = torch.stack(per_layer).mean(0)
    surprise, momentary, moved, written = mean.tolist()
    return Trace(surprise, momentary, moved, written)
