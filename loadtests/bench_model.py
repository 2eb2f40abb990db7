"""The served model in this process, and what one ingested token costs it by count. Knows no server.

Counted FLOPs of one token on ingest, a product of m x k by k x n being 2 m k n. Notation: d = dim, f = the
width of the SwiGLU, H heads of h = d / H, L = chunk, N_p = persistent tokens, and per head a memory of D
matrices, P their numbers of weights together. Of each layer:

    dense      lmm 10 d^2 + 6 d f + 6 H D d                 q, k, v, output gate, output; SwiGLU; three gates
               mag, mal 8 d^2 more                          q, k, v, output of attention
               mac 14 d^2 more                              and its own query, and keys and values of h
    attention  4 d (N_p + window + L)                       mag, mal: the fixed, masked key length
               4 d (N_p + 2 segment)                        mac: of h and of x
    update     H (2 P + 2 P' + 4 P)                         keys through M; the error back through P' weights,
                                                            all but the first matrix; folds into M and S
    read       H (4 P + 2 L sum(in + out))                  M and S together, and the chunk's own stores
               2 H P more                                   mac: the read at the segment's start

So a linear memory (D = 1) costs 6 h^2 + 4 h^2 + 4 L h a head, one of D = 2 and width w 14 h w + 8 h w +
4 L (h + w). Not counted: the head (ingest makes no logits), everything elementwise, norms, the convolution,
the decay weights of a chunk, and the persistent tokens' keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mnemosyne.checkpoints.weights import load_checkpoint
from mnemosyne.engine.advance import advance
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace

SUPER_CHUNK = 16
"""Chunks in one call, as the engine commits them."""


def flops_per_token(config: ModelConfig) -> dict[str, int]:
    """FLOPs of one ingested token over all layers, by the formula above; ``total`` and its parts."""
    d, heads, depth, L = config.dim, config.heads, config.memory.depth, config.chunk
    mac, attends = config.variant == "mac", config.variant != "lmm"
    shapes = config.memory_shapes
    weights = sum(out * inn for out, inn in shapes)
    later = sum(out * inn for out, inn in shapes[1:])
    squares = 10 + (14 if mac else 8 if attends else 0)
    keys = config.persistent + (2 * config.segment if mac else config.window + L)
    parts = {
        "dense": squares * d * d + 6 * d * config.ffn + 6 * heads * depth * d,
        "attention": 4 * d * keys if attends else 0,
        "update": heads * (2 * weights + 2 * later + 4 * weights),
        "read": heads * (4 * weights + 2 * L * sum(map(sum, shapes)) + (2 * weights if mac else 0)),
    }
    parts = {name: config.layers * count for name, count in parts.items()}
    return parts | {"total": sum(parts.values())}


def load_model(checkpoint: Path, compute: torch.dtype) -> Titans:
    """The checkpoint's model as the engine prepares it on a CPU. Raises ConfigError."""
    found = load_checkpoint(checkpoint)
    model = Titans(found.config)
    model.load_state_dict(found.tensors(model.state_dict()))
    return model.prepare(compute)


class Watched:
    """A model whose traces are kept while a state advances; ``advance.Prefills``."""

    def __init__(self, model: Titans) -> None:
        self._model = model
        self.written: list[float] = []
        """Per committed chunk, the share of memory cells that it changed."""

    def prefill(self, states: Sequence[SessionState], tokens: Tensor) -> tuple[list[SessionState], Trace]:
        after, trace = self._model.prefill(states, tokens)
        self.written += trace.written.flatten().tolist()
        return after, trace

    @property
    def share_written(self) -> float:
        """Of the chunks, those that changed any cell at all."""
        return sum(share > 0 for share in self.written) / max(1, len(self.written))


def read_in_process(model: Titans, tokens: Sequence[int]) -> tuple[SessionState, Watched]:
    """``advance`` of a new session over all tokens, a super-chunk of them at a time."""
    watched, state, step = Watched(model), model.initial_state(), SUPER_CHUNK * model.config.chunk
    for first in range(0, len(tokens), step):
        state = advance(watched, state, tokens[first : first + step], chunk=model.config.chunk)
    return state, watched
