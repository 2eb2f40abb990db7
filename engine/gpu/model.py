"""A Titans model on a GPU, for serving: whole chunks in waves of cells, tokens one by one by ``decode``.

Owns the room of its kernels, what is captured as graphs, and a session's way in and out: every state is one
allocation (``blob``). Satisfies ``runner.Model`` as ``engine.model.Titans`` does, which it is made of and
which is its reference. Knows no scheduler, no handle, no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.blob import BlobLayout, gpu_layout
from mnemosyne.engine.gpu.decode import Decoder
from mnemosyne.engine.gpu.open_cache import BlobChunk, open_layout
from mnemosyne.engine.gpu.schedule import Cells, Read, cell_rows, waves
from mnemosyne.engine.gpu.wave import Tokens, Wave
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.model import Titans
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace
from mnemosyne.kernels.positions import rotary_angles
from mnemosyne.kernels.triton.cells import FIELDS

CELLS = 96
"""Most cells of a wave; its room grows with them."""
TOKENS = 131_072
"""Most tokens of a call that go through at once; a longer one goes in pieces."""


class GpuTitans:
    def __init__(
        self, model: Titans, *, graphs: bool = True, tokens: int = TOKENS, cells: int = CELLS
    ) -> None:
        """``model`` is prepared, on its device. ``tokens`` and ``cells`` bound the room."""
        self.config: ModelConfig = model.config
        self.weights = Weights.of(model)
        self.device = model.device
        self.layout = gpu_layout(model.config, model.compute)
        self._initial = self._state(
            self.layout.pack(model.initial_state().tensors, self.device), model.initial_state()
        )
        self._opened = open_layout(model.config, model.compute)
        self._decoder = Decoder(model.config, self.weights, graphs=graphs)
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] | None = {} if graphs else None
        self._rows = cell_rows(model.config)
        self._tokens = Tokens.empty(model.config, tokens, self.device)
        self._most = cells
        sizes = {(count, rows) for count, rows in self._sizes()}
        meta = torch.empty(0, dtype=torch.uint8, device="meta")
        needed = max(Wave(self.config, self.weights, self.layout, *size, meta).needed for size in sizes)
        room = torch.empty(needed, dtype=torch.uint8, device=self.device)
        self._waves = {size: Wave(self.config, self.weights, self.layout, *size, room) for size in sizes}

    def _sizes(self) -> list[tuple[int, int]]:
        """(cells, rows of a cell) of the waves there are: by layers for one stream, as many as fit for more,
        and cells of one chunk."""
        config = self.config
        few = min(config.layers, self._most)
        short = self._most * self._rows // config.chunk
        return [
            (few, self._rows),
            (self._most, self._rows),
            (min(16, short), config.chunk),
            (short, config.chunk),
        ]

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
        most = max(1, self._tokens.residual.shape[0] // chunk // len(states)) * chunk
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
        cells = list(waves(reads, config.layers, size, chunk, self._most * self._rows // size))
        addresses = np.array([(blob.data_ptr(), 0, T) for blob in blobs], np.int64)
        detail = torch.zeros(2, config.layers, B * T, device=self.device) if per_token else None
        for wave, table in self._tables(cells, addresses, T, size):
            self._run(wave, table, None)
            if detail is not None:
                _detail(wave, table, detail)
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

    def _tables(
        self, cells: list[Cells], addresses: np.ndarray, tokens: int, size: int
    ) -> list[tuple[Wave, Tensor]]:
        """Each wave and its table, on the device by one copy. ``addresses`` `[B, 3]`: of each session's
        state, of its open chunk, and how many of its tokens count."""
        chosen = [self._wave(len(wave), size) for wave in cells]
        made = np.zeros((sum(len(FIELDS) * wave.count for wave in chosen),), np.int64)
        at, views = 0, []
        for wave, each in zip(chosen, cells, strict=True):
            table = made[at : at + len(FIELDS) * wave.count].reshape(len(FIELDS), wave.count)
            session, layer, first, chunks, place = each.T
            state, opened, counted = addresses[session].T
            columns = (layer, chunks, session * tokens + first, state, place, opened, counted - first)
            for row, values in zip(table, columns, strict=True):
                row[: len(each)] = values
            views.append((at, table.shape))
            at += table.size
        there = torch.from_numpy(made)
        if self.device.type == "cuda":
            there = there.pin_memory().to(self.device, non_blocking=True)
        return [
            (wave, there[at : at + len(FIELDS) * wave.count].view(shape))
            for wave, (at, shape) in zip(chosen, views, strict=True)
        ]

    def _wave(self, cells: int, rows: int) -> Wave:
        """The smallest that takes them."""
        return self._waves[min(size for size in self._waves if size[0] >= cells and size[1] == rows)]

    def _run(self, wave: Wave, table: Tensor, opened: BlobLayout | None) -> None:
        wave.table.copy_(table)
        if self._graphs is None:
            wave.run(self._tokens, opened)
            return
        key = (wave.count, wave.cell, opened is not None)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        # The first time compiles, which can't be captured; it is this wave's run, too.
        wave.run(self._tokens, opened)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy states meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            wave.run(self._tokens, opened)
        self._graphs[key] = graph

    def _told(self, sessions: int, tokens: int, detail: Tensor | None) -> Trace:
        """The call's trace, once everything has run."""
        config = self.config
        n = tokens // config.chunk
        rows = self._tokens.residual[: sessions * tokens].view(sessions, -1)
        ended = torch.isfinite(rows.sum(1)).cpu().numpy()
        found = self._tokens.summary[: sessions * n].cpu().numpy().reshape(sessions, n, config.layers, 5)
        chunks = np.ascontiguousarray(found[..., :4])
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
        chunks = [
            BlobChunk(
                state,
                state.pending[:n],
                state.kinds[:n],
                self.layout.pack(state.tensors, self.device),
                self._opened.empty(self.device),
            )
            for state, n in zip(states, prefix, strict=True)
        ]
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

    def _open(self, chunks: list[BlobChunk]) -> Tensor:
        """Fill open chunks that have tokens, all of them input; logits after their last."""
        config, L = self.config, self.config.chunk
        padded = torch.zeros(len(chunks), L, dtype=torch.int64)
        for row, chunk in zip(padded, chunks, strict=True):
            row[: chunk.length] = torch.tensor(chunk.tokens)
        reads = [Read(chunk.committed.position, L) for chunk in chunks]
        self._place(padded.to(self.device), [read.position for read in reads])
        addresses = np.array([(*chunk.addresses, chunk.length) for chunk in chunks], np.int64)
        cells = list(waves(reads, config.layers, L, L, self._most * self._rows // L))
        for wave, table in self._tables(cells, addresses, L, L):
            self._run(wave, table, self._opened)
        last = [b * L + chunk.length - 1 for b, chunk in enumerate(chunks)]
        return self._decoder.head(self._tokens.residual[last])

    @torch.inference_mode()
    def decode(self, chunks: Sequence[OpenChunk], tokens: Tensor) -> Tensor:
        """Append a generated token to each open chunk, which must have room; logits `[B, vocab]` after it."""
        ours = [chunk for chunk in chunks if isinstance(chunk, BlobChunk)]
        assert len(ours) == len(chunks), "a chunk was opened by another kind of model"
        return self._decoder.decode(ours, tokens)


def _detail(wave: Wave, table: Tensor, out: Tensor) -> None:
    """Surprise and momentary surprise of a wave's tokens, means over heads, to ``out`` `[2, layers,
    tokens]`."""
    theta = wave.decays.vectors[..., -1, :]
    both = torch.stack([wave.norms, wave.norms * theta])
    means = both.square().sum(4).sqrt().mean(3).flatten(2)  # [2, cells, rows]
    for cell, (layer, chunks, base) in enumerate(table[:3].T.tolist()):
        count = chunks * wave.norms.shape[-1]
        out[:, layer, base : base + count] = means[:, cell, :count]
