"""A Titans model on a GPU, for serving: whole chunks in waves of cells, tokens one by one by ``decode``.

Owns a session's way in and out: every state is one allocation (``blob``), and what a call has by token.
Satisfies ``runner.Model`` as ``engine.model.Titans`` does, which it is made of and which is its reference.
Knows no scheduler, no handle, no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.blob import gpu_layout
from mnemosyne.engine.gpu.decode import Decoder
from mnemosyne.engine.gpu.lanes import LANES, Lanes
from mnemosyne.engine.gpu.open_cache import BlobChunk, open_layout
from mnemosyne.engine.gpu.schedule import Read, cell_rows, waves
from mnemosyne.engine.gpu.wave import Tokens, Wave
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.model import Titans
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace
from mnemosyne.kernels.positions import rotary_angles

CELLS = 96
"""Most cells of a wave; its room grows with them."""
TOKENS = 131_072
"""Most tokens of a call that go through at once; a longer one goes in pieces."""


class GpuTitans:
    def __init__(
        self,
        model: Titans,
        *,
        graphs: bool = True,
        tokens: int = TOKENS,
        cells: int = CELLS,
        lanes: int = LANES,
    ) -> None:
        """``model`` is prepared, on its device. ``tokens`` and ``cells`` bound the room; no bit depends on
        them, on ``graphs`` or on ``lanes``."""
        self.config: ModelConfig = model.config
        self.weights = Weights.of(model)
        self.device = model.device
        self.layout = gpu_layout(model.config, model.compute)
        initial = model.initial_state()
        self._initial = self._state(self.layout.pack(initial.tensors, self.device), initial)
        self._opened = open_layout(model.config, model.compute)
        self._decoder = Decoder(model.config, self.weights, graphs=graphs)
        self._rows = cell_rows(model.config)
        self._tokens = Tokens.empty(model.config, tokens, self.device)
        self._lanes = Lanes(
            model.config,
            self.weights,
            self.layout,
            self._opened,
            self._tokens,
            cells,
            graphs=graphs,
            lanes=lanes,
        )

    def initial_state(self) -> SessionState:
        """M_0, and nothing read."""
        return self._initial

    def _state(self, blob: Tensor, like: SessionState, tokens: int = 0) -> SessionState:
        return dataclasses.replace(like, position=like.position + tokens, tensors=self.layout.views(blob))

    @torch.inference_mode()
    def prefill(
        self, states: Sequence[SessionState], tokens: Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace]:
        """Commit whole chunks ``tokens`` `[B, n chunk]` on states with nothing pending; the new states.

        ``per_token``: the trace has the values of every token too."""
        blobs = [self.layout.pack(state.tensors, self.device).clone() for state in states]
        parts = []
        chunk = self.config.chunk
        room = self._tokens.residual.shape[0]
        if len(states) * chunk > room:
            raise ValueError(f"{len(states)} sessions at once, and there is room for {room // chunk}")
        most = room // chunk // len(states) * chunk
        done = 0
        for piece in tokens.split(most, 1):
            reads = [Read(state.position + done, piece.shape[1]) for state in states]
            parts.append(self._read(blobs, reads, piece.to(self.device), per_token))
            done += piece.shape[1]
        trace = Trace.joined(parts)
        after = [self._state(blob, state, done) for blob, state in zip(blobs, states, strict=True)]
        return [
            dataclasses.replace(state, pyramid=state.pyramid.extended(chunks))
            for state, chunks in zip(after, trace.chunks, strict=True)
        ], trace

    def _read(self, blobs: list[Tensor], reads: list[Read], tokens: Tensor, per_token: bool) -> Trace:
        """What fits into ``Tokens``; the blobs move."""
        config, chunk = self.config, self.config.chunk
        B, T = tokens.shape
        self._place(tokens, [read.position for read in reads])
        size = chunk if tokens.shape[1] == chunk else self._rows
        cells = waves(reads, config.layers, size, chunk, self._lanes.most[size])
        addresses = np.array([(blob.data_ptr(), 0, T) for blob in blobs], np.int64)
        detail = torch.zeros(2, config.layers, B * T, device=self.device) if per_token else None
        for group in self._lanes.run(cells, addresses, T, size):
            if detail is not None:
                for lane in group.lanes:
                    _detail(lane, detail)
        return self._told(B, T, detail)

    def _place(self, tokens: Tensor, positions: Sequence[int]) -> None:
        """Embeddings and angles of ``tokens`` `[B, T]` into what kernels read by token."""
        B, T = tokens.shape
        config = self.config
        self._tokens.residual[: B * T] = F.embedding(tokens.reshape(-1), self.weights.embedding)
        places = torch.tensor(positions, dtype=torch.int64, device=self.device)[:, None]
        places = (places + torch.arange(T, device=self.device)).reshape(-1)
        if config.variant == "mac":
            places = places % config.segment
        cos, sin = rotary_angles(places, config.head_dim, config.rope_theta, torch.float32)
        self._tokens.cos[: B * T], self._tokens.sin[: B * T] = cos, sin

    def _told(self, sessions: int, tokens: int, detail: Tensor | None) -> Trace:
        """The call's trace, once everything has run."""
        config = self.config
        n = tokens // config.chunk
        rows = self._tokens.residual[: sessions * tokens].view(sessions, -1)
        ended = torch.isfinite(rows.sum(1)).cpu().numpy()
        found = self._tokens.summary[: sessions * n].cpu().numpy().reshape(sessions, n, config.layers, 5)
        chunks = found[..., :4].copy()
        finite = ended & np.isfinite(found[..., [0, 1, 2, 4]]).all((1, 2, 3))
        each = None
        if detail is not None:
            each = detail.view(2, config.layers, sessions, tokens).permute(2, 3, 1, 0).cpu().numpy()
        return Trace(chunks, found[..., 4].mean(-1, dtype=np.float64), each, finite)

    @torch.inference_mode()
    def open_chunk(self, states: Sequence[SessionState]) -> tuple[Tensor, list[OpenChunk]]:
        """Logits `[B, vocab]` after each state's last pending token, and the chunks to go on from.

        Tokens up to the last input token run as a chunk masked to their number, generated ones after it one
        by one: so every logit is a function of token ids and kinds alone (spec/memory.md 6)."""
        prefix = [state.kinds.rfind(b"\0") + 1 for state in states]
        chunks = self._chunks(states, prefix)
        logits = torch.zeros(len(states), self.config.vocab_size, device=self.device)
        most = self._tokens.residual.shape[0] // self.config.chunk
        begun = [b for b, n in enumerate(prefix) if n]
        for first in range(0, len(begun), most):
            which = begun[first : first + most]
            logits[which] = self._open([chunks[b] for b in which])
        for i in range(self.config.chunk):
            which = [b for b, state in enumerate(states) if prefix[b] + i < len(state.pending)]
            if not which:
                break
            ids = torch.tensor([states[b].pending[prefix[b] + i] for b in which])
            logits[which] = self._decoder.decode([chunks[b] for b in which], ids)
        return logits, list(chunks)

    @torch.inference_mode()
    def begin(self, states: Sequence[SessionState]) -> list[OpenChunk]:
        """Chunks without a token, on top of what is committed; what is pending isn't taken in."""
        return list(self._chunks(states, [0] * len(states)))

    def _chunks(self, states: Sequence[SessionState], prefix: Sequence[int]) -> list[BlobChunk]:
        """Of the first ``prefix`` pending tokens, of which nothing was computed yet."""
        return [
            BlobChunk(
                state,
                state.pending[:n],
                state.kinds[:n],
                self.layout.pack(state.tensors, self.device),
                self._opened.empty(self.device),
            )
            for state, n in zip(states, prefix, strict=True)
        ]

    def _open(self, chunks: list[BlobChunk]) -> Tensor:
        """Fill open chunks that have tokens, all of them input; logits after their last."""
        config, L = self.config, self.config.chunk
        padded = torch.zeros(len(chunks), L, dtype=torch.int64)
        for row, chunk in zip(padded, chunks, strict=True):
            row[: chunk.length] = torch.tensor(chunk.tokens)
        reads = [Read(chunk.committed.position, L) for chunk in chunks]
        self._place(padded.to(self.device), [read.position for read in reads])
        addresses = np.array([(*chunk.addresses, chunk.length) for chunk in chunks], np.int64)
        cells = waves(reads, config.layers, L, L, self._lanes.most[L])
        for _ in self._lanes.run(cells, addresses, L, L, opened=True):
            pass
        last = [b * L + chunk.length - 1 for b, chunk in enumerate(chunks)]
        return self._decoder.head(self._tokens.residual[last])

    @torch.inference_mode()
    def decode(self, chunks: Sequence[OpenChunk], tokens: Tensor) -> Tensor:
        """Append a generated token to each open chunk, which must have room; logits `[B, vocab]` after it."""
        ours = [chunk for chunk in chunks if isinstance(chunk, BlobChunk)]
        assert len(ours) == len(chunks), "a chunk was opened by another kind of model"
        return self._decoder.decode(ours, tokens)


def _detail(wave: Wave, out: Tensor) -> None:
    """Surprise and momentary surprise of a wave's tokens, means over heads, to ``out`` `[2, layers,
    tokens]`."""
    theta = wave.decays.vectors[..., -1, :]
    both = torch.stack([wave.norms, wave.norms * theta])
    means = both.square().sum(4).sqrt().mean(3).flatten(2)  # [2, cells, rows]
    for cell, (layer, chunks, base) in enumerate(wave.table[:3].T.tolist()):
        count = chunks * wave.norms.shape[-1]
        out[:, layer, base : base + count] = means[:, cell, :count]
