"""The Titans language model: embedding, blocks, head, and the three ways through them.

``prefill`` commits whole chunks, ``open_chunk`` and ``decode`` answer from an unfinished one. States go in
and come out; nothing of a session stays here. Knows no scheduler, no handle, no file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.engine.attention import Places
from mnemosyne.engine.commits import Made
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.layers import Dense, RMSNorm, SwiGLU, dense
from mnemosyne.engine.memory import State
from mnemosyne.engine.mixers import MIXERS, Mixer
from mnemosyne.engine.open_chunk import GroupedChunk, OpenChunk, group_of
from mnemosyne.engine.pyramid import Pyramid
from mnemosyne.engine.state import GENERATED, SessionState, state_layout
from mnemosyne.engine.trace import Trace, summarize
from mnemosyne.kernels.gates import Gates


class Block(nn.Module):
    """Llama's macro-architecture: x + mixer(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_mixer = RMSNorm(config.dim, config.norm_epsilon)
        self.mixer: Mixer = MIXERS[config.variant](config)
        self.norm_ffn = RMSNorm(config.dim, config.norm_epsilon)
        self.ffn = SwiGLU(config.dim, config.ffn, 0.5 / config.layers**0.5)

    def feed(self, x: Tensor, mixed: Tensor) -> Tensor:
        x, u = self.norm_ffn.add(x, mixed)
        return x + self.ffn(u)


class Training(NamedTuple):
    """What a training step needs of one pass."""

    hidden: Tensor
    """`[B, T, dim]`, normed: ``logits`` takes it."""
    gates: list[Gates]
    """Per layer `[B, H, D, T]`."""
    layers: list[State]
    """The state after it, layer by layer."""


class Titans(nn.Module):
    beside = sys.maxsize
    """Sessions that ``commit_beside`` takes at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.dim) * 0.02)
        # A ModuleList forgets what it is made of.
        self.blocks = cast(Sequence[Block], nn.ModuleList([Block(config) for _ in range(config.layers)]))
        self.norm = RMSNorm(config.dim, config.norm_epsilon)
        self.compute = torch.float32

    def prepare(self, compute: torch.dtype) -> Titans:
        """Make ready to serve: dense weights in ``compute`` precision for good, no gradients."""
        self.requires_grad_(False)
        self.set_compute(compute)
        for module in self.modules():
            if isinstance(module, Dense):
                module.weight.data = module.weight.data.to(compute)
        return self.eval()

    def set_compute(self, compute: torch.dtype) -> None:
        """Operand precision of dense products; while training, weights are cast on the way."""
        self.compute = compute
        for module in self.modules():
            if isinstance(module, Dense | RMSNorm):
                module.compute = compute

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def master(self) -> torch.dtype:
        """Precision of the memory and of everything that isn't a dense product."""
        return self.norm.weight.dtype

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def initial_layers(self, sessions: int) -> list[State]:
        """The state of sessions that have read nothing, layer by layer, differentiable."""
        layout = state_layout(self.config, self.compute, self.master)
        layers = []
        for block in self.blocks:
            state: State = {}
            for name, (shape, dtype) in layout.items():
                kind, _, index = name.partition(".")
                if kind in ("memory", "segment_memory"):
                    initial = block.mixer.memory.initial[int(index)]
                    state[name] = initial.unsqueeze(0).expand(sessions, *initial.shape)
                else:
                    state[name] = torch.zeros(sessions, *shape[1:], dtype=dtype, device=self.device)
            layers.append(state)
        return layers

    def initial_state(self) -> SessionState:
        """M_0, and nothing read."""
        with torch.inference_mode():
            return self._states(self.initial_layers(1), [0], [Pyramid.blank(self.config.layers)])[0]

    def _states(
        self, layers: list[State], positions: Sequence[int], pyramids: Sequence[Pyramid]
    ) -> list[SessionState]:
        stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return [
            SessionState(position, {name: t[:, b].clone() for name, t in stacked.items()}, pyramid=pyramid)
            for b, (position, pyramid) in enumerate(zip(positions, pyramids, strict=True))
        ]

    def _layers(self, states: Sequence[SessionState]) -> list[State]:
        """Sessions side by side, layer by layer; no copy where there is one."""
        batch = {
            name: states[0].tensors[name].unsqueeze(1)
            if len(states) == 1
            else torch.stack([s.tensors[name] for s in states], 1)
            for name in states[0].tensors
        }
        return [{name: t[i] for name, t in batch.items()} for i in range(self.config.layers)]

    def _places(self, states: Sequence[SessionState], length: int) -> Places:
        start = torch.tensor([s.position for s in states], dtype=torch.int64, device=self.device)
        return Places.of(self.config, start, length, self.master)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens.to(self.device), self.embedding).to(self.master)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` `[..., dim]`, normed, to `[..., vocab]` in fp32.

        Served in fp32 throughout: a logit of 10 rounded to bf16 is off by more than what decides between two
        tokens. While training, where many rows come through here, in the compute precision.
        """
        precision = self.master if not self.training else self.compute
        return dense(hidden, self.embedding.to(precision)).to(self.master)

    def forward(self, tokens: Tensor, layers: list[State] | None = None) -> Training:
        """Whole chunks ``tokens`` `[B, n chunk]` of sessions that begin with them, differentiable; ``layers``
        has what they begin with where that isn't ``initial_layers``, and is changed."""
        start = torch.zeros(tokens.shape[0], dtype=torch.int64, device=self.device)
        places = Places.of(self.config, start, tokens.shape[1], self.master)
        x = self.embed(tokens)
        u = self.blocks[0].norm_mixer(x)
        norms = [*(block.norm_mixer for block in self.blocks[1:]), self.norm]
        gates = []
        layers = self.initial_layers(tokens.shape[0]) if layers is None else layers
        for block, state, norm in zip(self.blocks, layers, norms, strict=True):
            mixed, history = block.mixer.sequence(u, state, places)
            x, u = block.norm_ffn.add(x, mixed)
            x, u = norm.add(x, block.ffn(u))
            gates.append(Gates.joined([learned.gates for learned in history]))
        return Training(u, gates, layers)

    @torch.inference_mode()
    def prefill(
        self, states: Sequence[SessionState], tokens: Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace]:
        """Commit whole chunks ``tokens`` `[B, n chunk]` on states with nothing pending; the new states.

        ``per_token``: the trace has the values of every token too.
        """
        return self._commit(states, tokens, per_token)[:2]

    def commit_beside(self, states: Sequence[SessionState], tokens: Tensor) -> Made:
        """``prefill``, here and now."""
        return Made(*self.prefill(states, tokens))

    @torch.inference_mode()
    def losses(self, states: Sequence[SessionState], tokens: Tensor) -> tuple[list[SessionState], Tensor]:
        """``prefill`` of all ``tokens`` `[B, n chunk + 1]` but the last; besides, the loss of each but the
        first, given all before it: nats `[B, n chunk]` in fp32."""
        after, _, x = self._commit(states, tokens[:, :-1])
        targets = tokens[:, 1:].to(self.device)
        chunk = self.config.chunk  # a whole row of logits takes as much memory as the vocabulary is large
        parts = [
            F.cross_entropy(
                self.logits(self.norm(x[:, i : i + chunk])).transpose(1, 2),
                targets[:, i : i + chunk],
                reduction="none",
            )
            for i in range(0, targets.shape[1], chunk)
        ]
        return after, torch.cat(parts, 1)

    def _commit(
        self, states: Sequence[SessionState], tokens: Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace, Tensor]:
        """``prefill``, and the last block's output `[B, n chunk, dim]`."""
        layers = self._layers(states)
        places = self._places(states, tokens.shape[1])
        x = self.embed(tokens)
        histories = []
        for block, state in zip(self.blocks, layers, strict=True):
            mixed, history = block.mixer.sequence(block.norm_mixer(x), state, places)
            x = block.feed(x, mixed)
            histories.append(history)
        trace = summarize(histories, [s.position // self.config.chunk for s in states], per_token)
        positions = [s.position + tokens.shape[1] for s in states]
        pyramids = [s.pyramid.extended(chunks) for s, chunks in zip(states, trace.chunks, strict=True)]
        return self._states(layers, positions, pyramids), trace, x

    @torch.inference_mode()
    def open_chunk(self, states: Sequence[SessionState]) -> tuple[Tensor, list[OpenChunk]]:
        """Logits `[B, vocab]` after each state's last pending token, and the chunks to go on from.

        Tokens up to the last input token run as a chunk masked to their number, generated ones after it one
        by one: so every logit is a function of token ids and kinds alone (spec/memory.md 6).
        """
        prefix = [s.kinds.rfind(b"\0") + 1 for s in states]
        logits = torch.zeros(len(states), self.config.vocab_size, dtype=self.master, device=self.device)
        chunks: list[OpenChunk | None] = [None] * len(states)
        begun = [b for b, n in enumerate(prefix) if not n]
        if begun:
            for b, chunk in zip(begun, self.begin([states[b] for b in begun]), strict=True):
                chunks[b] = chunk
        which = [b for b, n in enumerate(prefix) if n]
        if which:
            rows, opened = self._open([states[b] for b in which], [prefix[b] for b in which])
            for b, row, chunk in zip(which, rows, opened, strict=True):
                logits[b], chunks[b] = row, chunk
        opened_chunks = [chunk for chunk in chunks if chunk is not None]
        for i in range(self.config.chunk):
            which = [b for b, s in enumerate(states) if prefix[b] + i < len(s.pending)]
            if not which:
                break
            ids = torch.tensor([states[b].pending[prefix[b] + i] for b in which])
            logits[which] = self.decode([opened_chunks[b] for b in which], ids)
        return logits, opened_chunks

    @torch.inference_mode()
    def begin(self, states: Sequence[SessionState]) -> list[OpenChunk]:
        """Chunks without a token, on top of what is committed; what is pending isn't taken in."""
        group = [
            block.mixer.empty(layer) for block, layer in zip(self.blocks, self._layers(states), strict=True)
        ]
        return _grouped(states, [0] * len(states), group)

    def _open(self, states: list[SessionState], prefix: list[int]) -> tuple[Tensor, list[OpenChunk]]:
        length = torch.tensor(prefix, dtype=torch.int64, device=self.device)
        padded = torch.zeros(len(states), self.config.chunk, dtype=torch.int64)
        for b, (state, n) in enumerate(zip(states, prefix, strict=True)):
            padded[b, :n] = torch.tensor(state.pending[:n])
        places = self._places(states, self.config.chunk)
        x = self.embed(padded)
        group = []
        for block, layer in zip(self.blocks, self._layers(states), strict=True):
            mixed, cache = block.mixer.open(block.norm_mixer(x), layer, places, length)
            x = block.feed(x, mixed)
            group.append(cache)
        x = x[torch.arange(len(states)), length - 1]
        return self.logits(self.norm(x)).view(len(states), -1), _grouped(states, prefix, group)

    @torch.inference_mode()
    def decode(self, chunks: Sequence[OpenChunk], tokens: Tensor) -> Tensor:
        """Append a generated token to each open chunk, which must have room; logits `[B, vocab]` after it."""
        group = group_of(chunks)
        index = torch.tensor([c.length for c in chunks], dtype=torch.int64, device=self.device)
        start = index + torch.tensor([c.committed.position for c in chunks], device=self.device)
        places = Places.of(self.config, start, 1, self.master)
        x = self.embed(tokens.view(-1, 1))
        for block, cache in zip(self.blocks, group, strict=True):
            x = block.feed(x, block.mixer.step(block.norm_mixer(x), cache, index, places))
        for chunk, token in zip(chunks, tokens.tolist(), strict=True):
            chunk.append(token, GENERATED)
        return self.logits(self.norm(x[:, 0]))


def _grouped(states: Sequence[SessionState], prefix: Sequence[int], group: list[State]) -> list[OpenChunk]:
    """Chunks of the first ``prefix`` pending tokens, whose caches, in ``group``, are changed in place from
    here on: nothing in them may be shared with a committed state."""
    own = [
        {k: v if k.startswith(("memory.", "momentum.", "segment_")) else v.clone() for k, v in cache.items()}
        for cache in group
    ]
    return [
        GroupedChunk(state, state.pending[:n], state.kinds[:n], own, b)
        for b, (state, n) in enumerate(zip(states, prefix, strict=True))
    ]
