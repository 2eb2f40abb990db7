"""One token of many sessions through all layers, as launches that a CUDA graph can hold.

Owns the room of a step at each size of batch, the order of kernels in each block form, and the graphs.
Nothing of a session is copied: kernels find states and open chunks by the addresses in a table, which is the
one thing that goes to the device. The same math as ``mixers`` has for one token, which is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.ahead import Ahead
from mnemosyne.engine.gpu.blob import BlobLayout, gpu_layout
from mnemosyne.engine.gpu.open_cache import BlobChunk, open_layout
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.state import GENERATED
from mnemosyne.kernels.positions import rotary_angles
from mnemosyne.kernels.triton.rows import Operands
from mnemosyne.kernels.triton.step_attention import HeldRows, Room, rooms_of, step_attend
from mnemosyne.kernels.triton.step_memory import GateLimits, StepPlaces, step_memory
from mnemosyne.kernels.triton.step_product import GateProduct, grouped, product
from mnemosyne.kernels.triton.step_recall import step_recall
from mnemosyne.kernels.triton.step_rows import step_rows
from mnemosyne.kernels.triton.step_table import FIELDS, Streams

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sizes of a batch that there are steps for; a batch runs in the smallest that holds it."""


class Decoder:
    def __init__(self, config: ModelConfig, weights: Weights, *, graphs: bool = True) -> None:
        self._config, self._weights, self._graphs = config, weights, graphs
        self._gates = grouped(weights.gates)
        self._steps: dict[int, Step] = {}
        compute = weights.output.dtype
        self._ahead = Ahead(open_layout(config, compute), weights.output.device)

    @torch.inference_mode()
    def decode(self, chunks: Sequence[BlobChunk], tokens: Tensor) -> Tensor:
        """As ``Titans.decode``: append a generated token to each open chunk; logits `[B, vocab]` after it."""
        ids = tokens.tolist()
        logits = self._ahead.take(chunks, ids)
        if logits is None:
            most = BUCKETS[-1]
            parts = [
                self._some(chunks[first : first + most], ids[first : first + most])
                for first in range(0, len(ids), most)
            ]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        for chunk, token in zip(chunks, ids, strict=True):
            chunk.append(token, GENERATED)
        room = all(chunk.length < self._config.chunk for chunk in chunks)
        self._ahead.begin(chunks, logits, partial(self._some, chunks, ids) if room else None)
        return logits

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[B, vocab]` of rows of the residual stream, fp32 `[B, dim]`."""
        w = self._weights
        normed = torch.empty_like(hidden)
        step_rows("norm", hidden, normed, w.norm, self._config.norm_epsilon)
        logits = hidden.new_empty(hidden.shape[0], self._config.vocab_size)
        product(normed, w.embedding, logits)
        return logits

    def _some(self, chunks: Sequence[BlobChunk], ids: list[int], drawn: Tensor | None = None) -> Tensor:
        bucket = min(size for size in BUCKETS if size >= len(chunks))
        if bucket not in self._steps:
            self._steps[bucket] = Step(self._config, self._weights, self._gates, bucket, self._graphs)
        return self._steps[bucket](chunks, ids, drawn)


class Step:
    """Room for ``size`` sessions and what runs in it."""

    def __init__(self, config: ModelConfig, weights: Weights, gates: Tensor, size: int, graphs: bool) -> None:
        """``gates`` as products take them (``grouped``)."""
        self.config, self.weights, self.gates, self.size = config, weights, gates, size
        self.rule = config.memory.make_rule()
        compute = weights.output.dtype
        self.state = gpu_layout(config, compute)
        self.open = open_layout(config, compute)
        device, d, heads = weights.output.device, config.dim, config.heads

        # A tile of few rows is filled up by the device, which takes longer than to load rows of zeros; and
        # rows of empty columns are multiplied too: not by what stood there.
        rows = max(size, 64)

        def room(*shape: int, dtype: torch.dtype = compute) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        single = torch.float32
        self.residual, self.normed = room(d, dtype=single), room(d)
        self.first = room(weights.first.shape[1])
        self.h, self.attended, self.y, self.read, self.m = (room(d) for _ in range(5))
        self.context = None if weights.attention is None else room(weights.attention.shape[1])
        self.streams = None if weights.streams is None else room(weights.streams.shape[1])
        self.logits = room(weights.gates.shape[2], dtype=single)
        self.hidden = room(config.ffn)
        self.width = config.memory_shapes[-1][1]
        self.scratch = room(heads, 2 * self.width + config.head_dim, dtype=single)
        self.final = room(d, dtype=single)
        self.parts: Room | None = None
        if weights.persistent_k is not None:
            persistent, answered = weights.persistent_k.shape[2], config.variant == "mac"
            rooms = rooms_of(persistent, self._held, config.chunk, config.head_dim, answered)
            sums = room(heads, rooms, config.head_dim + 2, dtype=single)
            self.parts = Room(sums, room(heads, dtype=torch.int32))
        self.vocabulary = torch.zeros(size, config.vocab_size, dtype=single, device=device)
        self.table = torch.zeros(len(FIELDS), size, dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(self.table.shape, dtype=torch.int64, pin_memory=on_gpu)
        self._sent = torch.cuda.Event() if on_gpu else None
        self._turned: tuple[Tensor, Tensor] | None = None
        if config.variant == "mac":
            places = torch.arange(config.segment, device=device)
            self._turned = rotary_angles(places, config.head_dim, config.rope_theta, single)
        self._graph: torch.cuda.CUDAGraph | None = None
        if graphs:
            self._capture()

    @property
    def _held(self) -> int:
        """Rows that a state has for attention."""
        return self.config.segment if self.config.variant == "mac" else self.config.window

    def _capture(self) -> None:
        """With an empty table, so that the run that compiles the kernels, which can't be captured, touches no
        session."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # What another thread asks of a device meanwhile must not end the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.run()

    def __call__(self, chunks: Sequence[BlobChunk], ids: list[int], drawn: Tensor | None = None) -> Tensor:
        """Logits `[B, vocab]` after the tokens ``ids``; or after ``drawn`` `[B]`, on the device, in their
        place."""
        full = [chunk for chunk in chunks if chunk.length >= self.config.chunk]
        if full:
            raise ValueError(f"{len(full)} chunks have no room for a token")
        if self._sent is not None:
            self._sent.synchronize()  # what is sent is overwritten
        columns = [
            (*chunk.addresses, chunk.length, chunk.committed.position, token)
            for chunk, token in zip(chunks, ids, strict=True)
        ]
        self._host.zero_()
        self._host.numpy()[:, : len(columns)] = np.array(columns, np.int64).T
        self.table.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        if drawn is not None:
            self.table[FIELDS.index("token"), : len(columns)].copy_(drawn)
        if self._graph is None:
            self.run()
        else:
            self._graph.replay()
        return self.vocabulary[: len(columns)].clone()

    def run(self) -> None:
        """All launches of a step, by what the table says."""
        w, epsilon = self.weights, self.config.norm_epsilon
        _, _, index, position, tokens = self.table.unbind(0)
        self.angles = self._angles(position + index)
        torch.index_select(w.embedding, 0, tokens, out=self.residual[: len(tokens)])
        for layer in range(self.config.layers):
            step_rows("norm", self.residual, self.normed, w.norm_mixer[layer], epsilon)
            getattr(self, f"_{self.config.variant}")(layer)
            self._product(self.normed, w.up[layer], self.hidden, "swiglu")
            self._product(self.hidden, w.down[layer], self.residual, "add")
        step_rows("norm", self.residual, self.final, w.norm, epsilon)
        self._product(self.final, w.embedding, self.vocabulary)

    def _angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[sessions, head_dim / 2]` of absolute positions."""
        c = self.config
        if self._turned is None:
            return rotary_angles(places, c.head_dim, c.rope_theta, torch.float32)
        here = places % c.segment
        return self._turned[0][here], self._turned[1][here]

    def _mac(self, layer: int) -> None:
        c, w, d = self.config, self.weights, self.config.dim
        assert w.streams is not None and w.attention is not None and w.attended is not None
        assert self.streams is not None and self.context is not None
        self._product(self.normed, w.first[layer], self.first)
        step_recall(
            self.first,
            0,
            0,
            self.h,
            w.head_norm[layer],
            w.conv[layer],
            self.table,
            self._tails(layer),
            [self._committed(f"segment_memory.{i}", layer) for i in range(c.memory.depth)],
            self.width,
            self.rule.architecture,
            c.norm_epsilon,
        )
        self._product(self.h, w.attention[layer], self.context)
        self._attend(layer, self.first, d, self.context)
        self._product(self.attended, w.attended[layer], self.y)
        self._product(self.y, w.streams[layer], self.streams, gates=self._gates(layer))
        # Streams k, q', v and the output gate; in the tails they come after the query of h.
        self._remember(layer, self.streams, Streams((d, 0, 2 * d), (2 * d, d, 3 * d)), 3 * d)
        self._mix(layer)

    def _mag(self, layer: int) -> None:
        w, d = self.weights, self.config.dim
        assert w.attended is not None
        self._product(self.normed, w.first[layer], self.first, gates=self._gates(layer))
        self._attend(layer, self.first, 0, None)
        self._product(self.attended, w.attended[layer], self.y)
        self._remember(layer, self.first, Streams((3 * d, 4 * d, 5 * d), (0, d, 2 * d)), 6 * d)
        self._mix(layer)

    def _mal(self, layer: int) -> None:
        w, epsilon = self.weights, self.config.norm_epsilon
        assert w.attention is not None and w.attended is not None and w.norm_attention is not None
        assert self.context is not None
        self._memory_first(layer)
        step_rows("between", self.residual, self.normed, w.norm_attention[layer], epsilon, Operands(y=self.m))
        self._product(self.normed, w.attention[layer], self.context)
        self._attend(layer, self.context, 0, None)
        self._product(self.attended, w.attended[layer], self.residual, "add")
        step_rows("norm", self.residual, self.normed, w.norm_ffn[layer], epsilon)

    def _lmm(self, layer: int) -> None:
        self._memory_first(layer, self.residual)
        step_rows("norm", self.residual, self.normed, self.weights.norm_ffn[layer], self.config.norm_epsilon)

    def _memory_first(self, layer: int, residual: Tensor | None = None) -> None:
        """MAL, LMM: the memory of the normed stream, to ``m``, or added to ``residual``."""
        d = self.config.dim
        self._product(self.normed, self.weights.first[layer], self.first, gates=self._gates(layer))
        self._remember(layer, self.first, Streams((0, d, 2 * d), (0, d, 2 * d)), 3 * d, residual)

    def _attend(self, layer: int, x: Tensor, column: int, context: Tensor | None) -> None:
        c, w = self.config, self.weights
        assert w.persistent_k is not None and w.persistent_v is not None and self.parts is not None

        def held(*names: str) -> HeldRows:
            return HeldRows(*((self._committed(name, layer), self._own(name, layer)) for name in names))

        step_attend(
            x,
            column,
            context,
            w.persistent_k[layer],
            w.persistent_v[layer],
            *self.angles,
            self.attended,
            self.parts,
            held("keys", "values"),
            None if context is None else held("memory_keys", "memory_values"),
            self._held,
            c.chunk,
            self.table,
        )

    def _remember(
        self, layer: int, x: Tensor, streams: Streams, gate_column: int, residual: Tensor | None = None
    ) -> None:
        """The token into the memory, and what is read after it to ``m``, or added to ``residual``."""
        c, w, m = self.config, self.weights, self.config.memory
        assert m.eta_max is not None and m.alpha_max is not None
        ends = (0, m.depth - 1)
        (hidden_m, last_m), (hidden_s, last_s) = (
            [self._committed(f"{name}.{i}", layer) for i in ends] for name in ("memory", "momentum")
        )
        (keys, inputs), (hidden_deltas, last_deltas) = (
            [self._own(f"{name}.{i}", layer) for i in ends] for name in ("inputs", "deltas")
        )
        places = StepPlaces(
            self._tails(layer),
            (hidden_m, last_m),
            (hidden_s, last_s),
            (keys, inputs),
            (hidden_deltas, last_deltas),
            self._own("decay", layer),
            self._own("rows", layer),
        )
        step_memory(
            x,
            streams,
            gate_column,
            self.logits,
            self.read,
            w.head_norm[layer],
            w.conv[layer],
            self.scratch,
            self.table,
            places,
            GateLimits(m.theta_max, m.eta_max, m.alpha_max, m.gate_epsilon),
            m.depth,
            self.width,
            c.chunk,
            self.rule.architecture,
            m.clip,
            c.norm_epsilon,
        )
        if residual is None:
            self._product(self.read, w.output[layer], self.m)
        else:
            self._product(self.read, w.output[layer], residual, "add")

    def _mix(self, layer: int) -> None:
        """MAG, MAC: the gate of attention and memory, added to the stream, and the norm of what follows."""
        w, c = self.weights, self.config
        assert w.norm_attention is not None and w.norm_memory is not None
        step_rows(
            "gate" if c.gate == "default" else "paper",
            self.residual,
            self.normed,
            w.norm_ffn[layer],
            c.norm_epsilon,
            Operands(self.y, self.m, w.norm_attention[layer], w.norm_memory[layer]),
        )

    def _product(
        self,
        a: Tensor,
        weight: Tensor,
        out: Tensor,
        kind: str = "store",
        gates: GateProduct | None = None,
    ) -> None:
        product(a, weight, out[: self.size], kind, gates)

    def _gates(self, layer: int) -> GateProduct:
        return GateProduct(self.gates[layer], self.weights.gate_bias[layer], self.logits)

    def _committed(self, name: str, layer: int) -> int:
        return _offset(self.state, name, layer)

    def _own(self, name: str, layer: int) -> int:
        return _offset(self.open, name, layer)

    def _tails(self, layer: int) -> tuple[int, int]:
        return self._committed("tails", layer), self._own("tails", layer)


def _offset(layout: BlobLayout, name: str, layer: int) -> int:
    """Bytes from an allocation's beginning to one layer of a tensor in it."""
    place = layout.places[name]
    return place.offset + layer * place.stride
