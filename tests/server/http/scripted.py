"""A model whose answers can be foretold, for tests of the server around it: each byte leads to the next.

    ':' -> ' blue\\n'      '~' -> 'é\\n'      any small letter -> the next one      else -> 'x' without end

Its memory is a hash chain over the committed chunks, so that states differ as what they have read differs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from mnemosyne.engine.commits import Commit, Made
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import SnapshotCorrupt, StateIncompatible
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.messages import EngineInfo
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.pyramid import FIELDS, LEVELS, POINTS, Pyramid
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.state import GENERATED, SessionState
from mnemosyne.engine.trace import Trace

CHUNK = 8
FINGERPRINT = "scripted"
PROMPT = {
    "system": "{content}\n",
    "user": "Q: {content}\nA:",
    "assistant": " {content}\n",
    "end_of_turn": "\n",
    "stop": ["\n"],
}
NEXT = dict(zip(b": blue~\xc3", b" blue\n\xc3\xa9", strict=True))


def follower(byte: int) -> int:
    if byte in NEXT:
        return NEXT[byte]
    if byte == 0xA9:
        return ord("\n")
    if ord("a") <= byte < ord("x"):
        return byte + 1
    return ord("x")


class ScriptedModel:
    """Token ids are bytes. ``gate`` holds every step back while it is cleared; ``delay`` slows
    each, ``broken`` makes every step a bug."""

    beside = 1000

    def __init__(self) -> None:
        self.config = ModelConfig(variant="lmm", layers=1, dim=64, vocab_size=256, chunk=CHUNK)
        self.gate = threading.Event()
        self.gate.set()
        self.delay = 0.0
        self.broken = False
        self.decoded = 0

    def initial_state(self) -> SessionState:
        return SessionState(0, {"memory.0": torch.zeros(8)}, pyramid=Pyramid.blank(1))

    def prefill(
        self, states: Sequence[SessionState], tokens: Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace]:
        self._wait()
        after = []
        chunks = tokens.view(len(states), -1, CHUNK)
        # A token's surprise is its byte, a chunk's their mean, in each field.
        each = tokens.numpy().astype(np.float32)[..., None, None].repeat(2, -1)
        means = chunks.numpy().mean(-1)[..., None, None].repeat(len(FIELDS), -1).astype(np.float32)
        for state, row, values in zip(states, tokens.tolist(), means, strict=True):
            memory = state.tensors["memory.0"]
            for i in range(0, len(row), CHUNK):
                seed = hashlib.sha256(memory.numpy().tobytes() + bytes(row[i : i + CHUNK])).digest()
                memory = torch.from_numpy(np.random.default_rng(list(seed)).standard_normal(8).astype("f4"))
            position, pyramid = state.position + len(row), state.pyramid.extended(values)
            after.append(SessionState(position, {"memory.0": memory}, pyramid=pyramid))
        return after, Trace(means, np.ones(chunks.shape[:2]), each if per_token else None)

    def commit_beside(self, states: Sequence[SessionState], tokens: Tensor) -> Commit:
        return Made(*self.prefill(states, tokens))

    def open_chunk(self, states: Sequence[SessionState]) -> tuple[Tensor, list[OpenChunk]]:
        self._wait()
        chunks = [OpenChunk(state, state.pending, state.kinds) for state in states]
        return torch.stack([_logits(chunk) for chunk in chunks]), chunks

    def begin(self, states: Sequence[SessionState]) -> list[OpenChunk]:
        return [OpenChunk(state, (), b"") for state in states]

    def decode(self, chunks: Sequence[OpenChunk], tokens: Tensor) -> Tensor:
        self._wait()
        self.decoded += 1
        for chunk, token in zip(chunks, tokens.tolist(), strict=True):
            chunk.append(token, GENERATED)
        return torch.stack([_logits(chunk) for chunk in chunks])

    def _wait(self) -> None:
        time.sleep(self.delay)
        assert self.gate.wait(30)
        if self.broken:
            raise RuntimeError("a secret of the house")


def _logits(chunk: OpenChunk) -> Tensor:
    logits = torch.zeros(256)
    logits[follower(chunk.tokens[-1])] = 30.0
    return logits


def dump(state: SessionState) -> bytes:
    trace = base64.b64encode(state.pyramid.array().tobytes()).decode()
    content = [state.position, state.tensors["memory.0"].tolist(), state.pending, list(state.kinds), trace]
    return json.dumps([FINGERPRINT, *content]).encode()


def load(data: bytes) -> SessionState:
    try:
        fingerprint, position, memory, pending, kinds, trace = json.loads(data)
    except ValueError as error:
        raise SnapshotCorrupt("this isn't a state") from error
    if fingerprint != FINGERPRINT:
        raise StateIncompatible("this state is of other weights")
    levels = np.frombuffer(base64.b64decode(trace), "<f4").reshape(LEVELS, POINTS, 1, len(FIELDS))
    pyramid = Pyramid.of(position // CHUNK, levels)
    return SessionState(position, {"memory.0": torch.tensor(memory)}, tuple(pending), bytes(kinds), pyramid)


INFO = EngineInfo(
    model_fingerprint=FINGERPRINT,
    numerics_fingerprint="n",
    numerics={"device": "cpu"},
    config={"chunk": CHUNK},
    device="cpu",
    dtype="float32",
    parameters=1,
    state_bytes=32,
    max_queued_tokens=0,
)


def scripted_engine(model: ScriptedModel, max_queued_tokens: int = 1 << 18) -> InlineEngine:
    limits = Limits(max_queued_tokens=max_queued_tokens)
    return InlineEngine(Engine(model, INFO, limits, dump, load))


def write_checkpoint(folder: Path) -> Path:
    """A folder with what the server itself reads: a tokenizer whose ids are bytes, and a chat template."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte)
    tokenizer = Tokenizer(models.BPE(vocab={mark: _byte(mark) for mark in alphabet}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "prompt.json").write_text(json.dumps(PROMPT), encoding="utf-8")
    return folder


def _byte(mark: str) -> int:
    from mnemosyne.server.sessions.tokens import byte_alphabet

    return byte_alphabet()[mark]
