"""A Titans model on a GPU, for serving: whole chunks in waves of cells, tokens one by one by ``decode``.

Owns a session's way in and out: every state is one allocation (``blob``). Reading is ``reading``'s.
Satisfies ``runner.Model`` as ``engine.model.Titans`` does, which it is made of and which is its reference.
Knows no scheduler, no handle, no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.beside import SESSIONS, Beside, Streamed
from mnemosyne.engine.gpu.blob import gpu_layout
from mnemosyne.engine.gpu.decode import Decoder
from mnemosyne.engine.gpu.lanes import LANES
from mnemosyne.engine.gpu.open_cache import BlobChunk, open_layout
from mnemosyne.engine.gpu.reading import Reader
from mnemosyne.engine.gpu.schedule import cell_rows
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.model import Titans
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace

CELLS = 96
"""Most cells of a wave; its room grows with them."""
TOKENS = 131_072
"""Most tokens of a call that go through at once; a longer one goes in pieces."""


class GpuTitans:
    beside = SESSIONS

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
        rows, chunk = cell_rows(model.config), model.config.chunk
        made = model.config, self.weights, self.layout, self._opened
        # As many tokens in single chunks as in whole cells.
        most = {rows: cells, chunk: cells * rows // chunk}
        self._reader = Reader(*made, tokens, most, graphs=graphs, lanes=lanes)
        self._beside = Beside(*made, graphs=graphs)

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
        parts: list[Trace] = []
        after = list(states)
        chunk = self.config.chunk
        room = self._reader.tokens
        if len(states) * chunk > room:
            raise ValueError(f"{len(states)} sessions at once, and there is room for {room // chunk}")
        most = room // chunk // len(states) * chunk
        done = 0
        for piece in tokens.split(most, 1):
            positions = [state.position + done for state in states]
            told = self._reader.read(blobs, positions, piece, per_token)
            done += piece.shape[1]
            # While the device is busy.
            after = [self._state(blob, state, done) for blob, state in zip(blobs, states, strict=True)]
            parts.append(told.trace())
        trace = Trace.joined(parts)
        return [
            dataclasses.replace(state, pyramid=state.pyramid.extended(chunks))
            for state, chunks in zip(after, trace.chunks, strict=True)
        ], trace

    @torch.inference_mode()
    def commit_beside(self, states: Sequence[SessionState], tokens: Tensor) -> Streamed:
        """``prefill`` of one chunk ``tokens`` `[B, chunk]`, on the host, on a stream of its own.

        Launching it takes the host a while: that comes after the next ``decode`` was launched, which the
        commit doesn't wait for."""
        return self._beside.commit(states, tokens)

    @torch.inference_mode()
    def open_chunk(self, states: Sequence[SessionState]) -> tuple[Tensor, list[OpenChunk]]:
        """Logits `[B, vocab]` after each state's last pending token, and the chunks to go on from.

        Tokens up to the last input token run as a chunk masked to their number, generated ones after it one
        by one: so every logit is a function of token ids and kinds alone (spec/memory.md 6)."""
        prefix = [state.kinds.rfind(b"\0") + 1 for state in states]
        chunks = self._chunks(states, prefix)
        logits = torch.zeros(len(states), self.config.vocab_size, device=self.device)
        most = self._reader.tokens // self.config.chunk
        begun = [b for b, n in enumerate(prefix) if n]
        for first in range(0, len(begun), most):
            which = begun[first : first + most]
            logits[which] = self._decoder.head(self._reader.open([chunks[b] for b in which]))
        for i in range(self.config.chunk):
            which = [b for b, state in enumerate(states) if prefix[b] + i < len(state.pending)]
            if not which:
                break
            ids = torch.tensor([states[b].pending[prefix[b] + i] for b in which])
            logits[which] = self._decoder.decode([chunks[b] for b in which], ids)
        self._beside.launch()
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

    @torch.inference_mode()
    def decode(self, chunks: Sequence[OpenChunk], tokens: Tensor) -> Tensor:
        """Append a generated token to each open chunk, which must have room; logits `[B, vocab]` after it."""
        ours = [chunk for chunk in chunks if isinstance(chunk, BlobChunk)]
        assert len(ours) == len(chunks), "a chunk was opened by another kind of model"
        logits = self._decoder.decode(ours, tokens)
        self._beside.launch()
        return logits
