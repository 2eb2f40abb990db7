"""The four block forms: how memory and attention make one layer's mixer. Knows no session.

Each form says it three times: for whole chunks (``sequence``), for the first tokens of an open chunk
(``open``), and for one token (``step``). Source: Titans 4.1-4.3; MAC in the causal form of spec/memory.md 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnemosyne.engine.attention import Attention, Places
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.layers import RMSNorm
from mnemosyne.engine.memory import Learned, NeuralMemory, State
from mnemosyne.kernels import elementwise, fusion


class Mixer(nn.Module):
    """LMM: the memory is the mixer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = NeuralMemory(config)

    def sequence(self, u: Tensor, state: State, places: Places) -> tuple[Tensor, list[Learned]]:
        """Whole chunks ``u`` `[B, T, dim]`: output, and what was learned. Replaces tensors in ``state``."""
        o, learned, _, _ = self.whole(u, state, places)
        return o, [learned]

    def whole(self, u: Tensor, state: State, places: Places) -> tuple[Tensor, Learned, Tensor, State]:
        """``sequence``, and what an open chunk needs besides: conv rows, keys and values."""
        o, learned, rows = self.memory.sequence(u, state)
        return o, learned, rows, {}

    def open(self, u: Tensor, state: State, places: Places, length: Tensor) -> tuple[Tensor, State]:
        """One chunk of which only ``length[b]`` tokens count: output rows, and the cache to go on from.

        Everything is causal, so the rows before ``length`` are what they would be in the whole chunk.
        """
        committed = dict(state)
        o, learned, rows, kept = self.whole(u, state, places)
        return o, self.memory.open(learned, rows, length, committed) | kept

    def empty(self, state: State) -> State:
        """The cache of a chunk without tokens, on top of the committed ``state``."""
        length = torch.zeros(state["tails"].shape[0], dtype=torch.int64, device=state["tails"].device)
        cache = self.memory.open(None, state["tails"], length, state)
        for name in ("keys", "values"):
            if name in state:
                room = state[name].shape[:2] + (self.config.chunk, state[name].shape[3])
                cache[name] = torch.cat([state[name], state[name].new_zeros(room)], 2)
        return cache

    def step(self, u: Tensor, cache: State, index: Tensor, places: Places) -> Tensor:
        """One token a session, ``u`` `[B, 1, dim]`, at ``index[b]`` of its chunk; changes the cache."""
        return self.memory.sequence_step(u, cache, index)


class MemoryAsLayer(Mixer):
    """MAL: attention over what the memory made of the input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.attention = Attention(config)
        self.between = RMSNorm(config.dim, config.norm_epsilon)

    def whole(self, u: Tensor, state: State, places: Places) -> tuple[Tensor, Learned, Tensor, State]:
        y, learned, rows = self.memory.sequence(u, state)
        o, kept = self.attention.window(self.between(y), state, places)
        return o, learned, rows, kept

    def step(self, u: Tensor, cache: State, index: Tensor, places: Places) -> Tensor:
        y = self.memory.sequence_step(u, cache, index)
        return self.attention.window_step(self.between(y), cache, index, places)


class Gated(Mixer):
    """What MAG and MAC share: o = gate(y, m) = n1(y) sigmoid(n2(m)) + n2(m); ``paper`` has no last term."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.attention = Attention(config)
        self.norm_attention = RMSNorm(config.dim, config.norm_epsilon)
        self.norm_memory = RMSNorm(config.dim, config.norm_epsilon)

    def gate(self, y: Tensor, m: Tensor) -> Tensor:
        if fusion.fuses(y):
            from mnemosyne.kernels.triton.train_gate import gate

            weights = self.norm_attention.weight, self.norm_memory.weight
            return gate(y, m, *weights, self.config.norm_epsilon, self.config.gate == "paper")
        y, m = self.norm_attention(y), self.norm_memory(m)
        gated = y * elementwise.sigmoid(m)
        return gated if self.config.gate == "paper" else gated + m


class MemoryAsGate(Gated):
    """MAG: attention and memory side by side."""

    def whole(self, u: Tensor, state: State, places: Places) -> tuple[Tensor, Learned, Tensor, State]:
        y, kept = self.attention.window(u, state, places)
        m, learned, rows = self.memory.sequence(u, state)
        return self.gate(y, m), learned, rows, kept

    def step(self, u: Tensor, cache: State, index: Tensor, places: Places) -> Tensor:
        y = self.attention.window_step(u, cache, index, places)
        return self.gate(y, self.memory.sequence_step(u, cache, index))


class MemoryAsContext(Gated):
    """MAC: attention over [p, h, x] of a segment, h read from the memory as it stood at the segment's start;
    the memory stores what attention made, and is read once more."""

    BUFFERS = ("keys", "values", "memory_keys", "memory_values")

    def sequence(self, u: Tensor, state: State, places: Places) -> tuple[Tensor, list[Learned]]:
        L, segment = self.config.chunk, self.config.segment
        outputs, history = [], []
        for first in range(0, u.shape[1], L):
            here = Places(
                places.start + first, places.cos[:, :, first : first + L], places.sin[:, :, first : first + L]
            )
            o, learned, _, _ = self.whole(u[:, first : first + L], state, here)
            outputs.append(o)
            history.append(learned)
            # Sessions of a batch stand at different places, so each ends its own segment.
            ended = (here.start + L) % segment == 0
            if bool(ended.any()):
                self._end_segment(state, ended.view(-1, 1, 1, 1))
        return torch.cat(outputs, 1), history

    def _end_segment(self, state: State, ended: Tensor) -> None:
        for name in self.BUFFERS:
            state[name] = torch.where(ended, torch.zeros_like(state[name]), state[name])
        for i in range(self.config.memory.depth):
            state[f"segment_memory.{i}"] = torch.where(
                ended, state[f"memory.{i}"], state[f"segment_memory.{i}"]
            )

    def whole(self, u: Tensor, state: State, places: Places) -> tuple[Tensor, Learned, Tensor, State]:
        """One chunk, which lies in one segment; the segment isn't ended here."""
        memory, offset = self.memory, places.start % self.config.segment
        y, q, k, v, rows = self._attend(u, state, state, offset, places)
        state["tails"] = rows[:, -(self.config.conv - 1) :]
        learned = memory.learn(k, v, y, state)
        m = memory.emit(memory.read(q, learned), y)
        kept = {
            name: state[name] for name in state if name in self.BUFFERS or name.startswith("segment_memory")
        }
        return self.gate(y, m), learned, rows, kept

    def _attend(
        self, u: Tensor, state: State, buffers: State, offset: Tensor, places: Places
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From ``u`` to attention's output y `[B, T, dim]`, to q', k, v made of y, and to the conv rows."""
        memory, attention, d = self.memory, self.attention, self.config.dim
        assert memory.query is not None
        tails = state["tails"]
        (q,), query_rows = memory.features(memory.query(u), memory.conv[:, :d], tails[..., :d], keys=1)
        h = memory.recall(q, state)
        h = h.transpose(1, 2).reshape(u.shape)
        queries = attention.segment_rows(u, h, buffers, offset, places)
        y = attention.segment(queries, buffers, offset)
        (k, q, v), rows = memory.features(memory.project(y), memory.conv[:, d:], tails[..., d:], keys=2)
        return y, q, k, v, torch.cat([query_rows, rows], -1)

    def empty(self, state: State) -> State:
        length = torch.zeros(state["tails"].shape[0], dtype=torch.int64, device=state["tails"].device)
        kept = {
            name: state[name] for name in state if name in self.BUFFERS or name.startswith("segment_memory")
        }
        return self.memory.open(None, state["tails"], length, state) | kept

    def step(self, u: Tensor, cache: State, index: Tensor, places: Places) -> Tensor:
        offset = places.start % self.config.segment
        buffers = {name: cache[name] for name in self.BUFFERS}
        y, q, k, v, rows = self._attend(u, cache, buffers, offset, places)
        for name in self.BUFFERS:
            cache[name].copy_(buffers[name])
        cache["tails"].copy_(rows[:, 1:])
        return self.gate(y, self.memory.emit(self.memory.step(q, k, v, y, cache, index), y))


MIXERS: dict[str, type[Mixer]] = {
    "lmm": Mixer,
    "mal": MemoryAsLayer,
    "mag": MemoryAsGate,
    "mac": MemoryAsContext,
}
