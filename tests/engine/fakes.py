"""A model without mathematics, for tests of everything around one: fast, exact, and it breaks on command.

Memory is a hash chain over the committed chunks, logits are a hash of memory, pending ids and their kinds: so
a wrong order, a lost token or a mixed-up row shows in every later bit.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mnemosyne.engine.commits import Commit, Made
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import SnapshotCorrupt
from mnemosyne.engine.messages import EngineInfo
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.pyramid import FIELDS, Pyramid
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.state import GENERATED, SessionState
from mnemosyne.engine.trace import Trace

CHUNK = 4
VOCAB = 50
POISON = 40
"""A chunk with this id makes the memory NaN."""
BLIND = 41
"""Logits while this id is pending are NaN."""
BOMB = 42
"""A batch with this id raises."""
BLANK = 43
"""A chunk that begins with this id writes nothing."""


class FakeModel:
    beside = 1000

    def __init__(self) -> None:
        self.config = ModelConfig(variant="lmm", layers=1, dim=64, vocab_size=VOCAB, chunk=CHUNK)
        self.prefills: list[tuple[int, int]] = []
        """(sessions, chunks) of each call."""
        self.decodes: list[int] = []
        self.gate = threading.Event()
        """Cleared, the next prefill waits for it."""
        self.gate.set()
        self.entered = threading.Event()
        """Set by each prefill as it begins."""

    def initial_state(self) -> SessionState:
        return SessionState(0, {"memory.0": torch.zeros(8)}, pyramid=Pyramid.blank(1))

    def prefill(
        self, states: Sequence[SessionState], tokens: Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace]:
        self.entered.set()
        assert self.gate.wait(30)
        assert all(not state.pending for state in states)
        assert tokens.shape[0] == len(states) and tokens.shape[1] % CHUNK == 0
        self._explode(tokens.flatten().tolist())
        self.prefills.append((len(states), tokens.shape[1] // CHUNK))
        after = []
        chunks = tokens.view(len(states), -1, CHUNK)
        # What can be told from the ids alone: a token's surprise is its id, a chunk's their mean.
        each = tokens.numpy().astype(np.float32)[..., None, None].repeat(2, -1)
        means = chunks.numpy().mean(-1)[..., None, None].repeat(len(FIELDS), -1).astype(np.float32)
        for state, row, values in zip(states, tokens.tolist(), means, strict=True):
            memory = state.tensors["memory.0"]
            for i in range(0, len(row), CHUNK):
                memory = _floats(memory, row[i : i + CHUNK], b"")
                if POISON in row:
                    memory[3] = float("nan")
            position, pyramid = state.position + len(row), state.pyramid.extended(values)
            after.append(SessionState(position, {"memory.0": memory}, pyramid=pyramid))
        return after, Trace(means, (chunks[..., 0] != BLANK).double().numpy(), each if per_token else None)

    def commit_beside(self, states: Sequence[SessionState], tokens: Tensor) -> Commit:
        return Made(*self.prefill(states, tokens))

    def open_chunk(self, states: Sequence[SessionState]) -> tuple[Tensor, list[OpenChunk]]:
        chunks = [OpenChunk(state, state.pending, state.kinds) for state in states]
        assert all(0 < chunk.length <= CHUNK for chunk in chunks)
        return torch.stack([self._logits(chunk) for chunk in chunks]), chunks

    def begin(self, states: Sequence[SessionState]) -> list[OpenChunk]:
        return [OpenChunk(state, (), b"") for state in states]

    def decode(self, chunks: Sequence[OpenChunk], tokens: Tensor) -> Tensor:
        self.decodes.append(len(chunks))
        for chunk, token in zip(chunks, tokens.tolist(), strict=True):
            assert chunk.length < CHUNK
            chunk.append(token, GENERATED)
        return torch.stack([self._logits(chunk) for chunk in chunks])

    def _logits(self, chunk: OpenChunk) -> Tensor:
        self._explode(chunk.tokens)
        logits = _floats(chunk.committed.tensors["memory.0"], chunk.tokens, chunk.kinds, VOCAB)
        logits[[POISON, BLIND, BOMB]] = -100.0
        if BLIND in chunk.tokens:
            logits[7] = float("nan")
        return logits

    def _explode(self, ids: Sequence[int]) -> None:
        if BOMB in ids:
            raise RuntimeError("boom")


def _floats(memory: Tensor, ids: Sequence[int], kinds: bytes, n: int = 8) -> Tensor:
    seed = hashlib.sha256(memory.numpy().tobytes() + bytes(ids) + b"|" + kinds).digest()
    return torch.from_numpy(np.random.default_rng(list(seed)).standard_normal(n).astype(np.float32))


def dump(state: SessionState) -> bytes:
    return json.dumps(
        [state.position, state.tensors["memory.0"].tolist(), state.pending, list(state.kinds)]
    ).encode()


def load(data: bytes) -> SessionState:
    try:
        position, memory, pending, kinds = json.loads(data)
    except ValueError as error:
        raise SnapshotCorrupt("not a state") from error
    return SessionState(position, {"memory.0": torch.tensor(memory)}, tuple(pending), bytes(kinds))


INFO = EngineInfo(
    model_fingerprint="m",
    numerics_fingerprint="n",
    numerics={"device": "cpu"},
    config={},
    device="cpu",
    dtype="float32",
    parameters=0,
    state_bytes=32 + Pyramid.blank(1).nbytes,
    max_queued_tokens=0,
)


def fake_engine(model: FakeModel | None = None, **limits: float) -> Engine:
    return Engine(model or FakeModel(), INFO, Limits(**limits), dump, load)  # type: ignore[arg-type]
