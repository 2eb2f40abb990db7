"""Tokens of many sessions read at once: whole chunks, by which states move, or open ones, which leave them.

Owns the room of such a call, which is in use until what was launched has run: calls on one stream follow one
another. Knows a session by the allocations that kernels find it in, no state and no scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.blob import BlobLayout
from mnemosyne.engine.gpu.lanes import Lanes
from mnemosyne.engine.gpu.open_cache import BlobChunk
from mnemosyne.engine.gpu.schedule import Read, cell_rows, waves
from mnemosyne.engine.gpu.wave import Tokens, Wave
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.trace import Trace
from mnemosyne.kernels.positions import rotary_angles


@dataclass(frozen=True)
class Told:
    """What a call has to tell, once it has run."""

    ended: Tensor
    """`[B]`: whether what came out of the last layer is finite."""
    summary: Tensor
    """fp32 `[B, n, layers, 5]` (``summary.summarize``)."""
    detail: Tensor | None
    """Where asked for, fp32 `[2, layers, B, T]`: surprise and momentary of every token."""

    def on_host(self) -> Told:
        """The same in memory of its own, on its way there."""
        detail = None if self.detail is None else _to_host(self.detail)
        return Told(_to_host(self.ended), _to_host(self.summary), detail)

    def trace(self) -> Trace:
        found = self.summary.cpu().numpy()
        finite = self.ended.cpu().numpy() & np.isfinite(found[..., [0, 1, 2, 4]]).all((1, 2, 3))
        each = None if self.detail is None else self.detail.permute(2, 3, 1, 0).cpu().numpy()
        return Trace(found[..., :4].copy(), found[..., 4].mean(-1, dtype=np.float64), each, finite)


class Reader:
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layout: BlobLayout,
        opened: BlobLayout,
        tokens: int,
        cells: Mapping[int, int],
        *,
        graphs: bool,
        lanes: int,
    ) -> None:
        """Room for ``tokens`` at once, over all sessions, and for ``cells``, the most of a wave, by their
        rows. ``layout`` and ``opened`` are those of a state and of an open chunk."""
        self._config, self._weights = config, weights
        self._device = weights.output.device
        self._rows = cell_rows(config)
        self._tokens = Tokens.empty(config, tokens, self._device)
        self._lanes = Lanes(config, weights, layout, opened, self._tokens, cells, graphs=graphs, lanes=lanes)
        self.tokens = tokens

    def read(
        self, blobs: Sequence[Tensor], positions: Sequence[int], tokens: Tensor, per_token: bool = False
    ) -> Told:
        """Whole chunks `[B, T]`, for which there is room; the states in ``blobs``, which stand at
        ``positions``, move."""
        config, chunk = self._config, self._config.chunk
        B, T = tokens.shape
        self._place(tokens, positions)
        size = chunk if chunk == T else self._rows
        addresses = np.array([(blob.data_ptr(), 0, T) for blob in blobs], np.int64)
        reads = [Read(position, T) for position in positions]
        cells = waves(reads, config.layers, size, chunk, self._lanes.most[size])
        detail = torch.zeros(2, config.layers, B * T, device=self._device) if per_token else None
        for group in self._lanes.run(cells, addresses, T, size):
            if detail is not None:
                for lane in group.lanes:
                    _detail(lane, detail)
        summary = self._tokens.summary[: B * (T // chunk)]
        return Told(
            torch.isfinite(self._tokens.residual[: B * T].view(B, -1).sum(1)),
            summary.view(B, T // chunk, config.layers, summary.shape[-1]),
            None if detail is None else detail.view(2, config.layers, B, T),
        )

    def open(self, chunks: Sequence[BlobChunk]) -> Tensor:
        """Fill open chunks that have tokens, all of them input; the residual stream after their last, fp32
        `[B, dim]`."""
        L = self._config.chunk
        padded = torch.zeros(len(chunks), L, dtype=torch.int64)
        for row, chunk in zip(padded, chunks, strict=True):
            row[: chunk.length] = torch.tensor(chunk.tokens)
        reads = [Read(chunk.committed.position, L) for chunk in chunks]
        self._place(padded, [read.position for read in reads])
        addresses = np.array([(*chunk.addresses, chunk.length) for chunk in chunks], np.int64)
        cells = waves(reads, self._config.layers, L, L, self._lanes.most[L])
        for _ in self._lanes.run(cells, addresses, L, L, opened=True):
            pass
        last = [b * L + chunk.length - 1 for b, chunk in enumerate(chunks)]
        return self._tokens.residual[last]

    def _place(self, tokens: Tensor, positions: Sequence[int]) -> None:
        """Embeddings and angles of ``tokens`` `[B, T]` into what kernels read by token."""
        B, T = tokens.shape
        config = self._config
        ids = _to_device(tokens, self._device).reshape(-1)
        self._tokens.residual[: B * T] = F.embedding(ids, self._weights.embedding)
        places = _to_device(torch.tensor(positions, dtype=torch.int64)[:, None], self._device)
        places = (places + torch.arange(T, device=self._device)).reshape(-1)
        if config.variant == "mac":
            places = places % config.segment
        cos, sin = rotary_angles(places, config.head_dim, config.rope_theta, torch.float32)
        self._tokens.cos[: B * T], self._tokens.sin[: B * T] = cos, sin


def _detail(wave: Wave, out: Tensor) -> None:
    """Surprise and momentary surprise of a wave's tokens, means over heads, to ``out`` `[2, layers,
    tokens]`."""
    theta = wave.decays.vectors[..., -1, :]
    both = torch.stack([wave.norms, wave.norms * theta])
    means = both.square().sum(4).sqrt().mean(3).flatten(2)  # [2, cells, rows]
    for cell, (layer, chunks, base) in enumerate(wave.table[:3].T.tolist()):
        count = chunks * wave.norms.shape[-1]
        out[:, layer, base : base + count] = means[:, cell, :count]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    pinned = tensor.device.type == "cuda"
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return there.copy_(tensor, non_blocking=True)
