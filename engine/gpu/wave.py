"""One wave: cells that don't wait for one another, taken through their layers. Owns the room that their rows
need, and the order of kernels in each block form; knows no session, only the table
(``kernels.triton.cells``).

The same math as ``mixers`` and ``memory`` have for whole chunks, which is the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.blob import BlobLayout
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.trace import GAIN_EVERY
from mnemosyne.kernels.triton import (
    attention,
    cell_gates,
    learn,
    open_chunk,
    recall,
    rows,
    segment_end,
    streams,
    summary,
)
from mnemosyne.kernels.triton.gemm import gemm


@dataclass(frozen=True)
class Tokens:
    """What a call has by token: rows of its sessions one after the other."""

    residual: Tensor
    """fp32 `[tokens, dim]`, the stream between blocks."""
    cos: Tensor
    """fp32 `[tokens, head_dim / 2]`."""
    sin: Tensor
    summary: Tensor
    """fp32 `[chunks, layers, 5]` (``summary.summarize``)."""

    @classmethod
    def empty(cls, config: ModelConfig, tokens: int, device: torch.device) -> Tokens:
        def made(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        half = config.head_dim // 2
        return cls(
            made(tokens, config.dim),
            made(tokens, half),
            made(tokens, half),
            made(tokens // config.chunk, config.layers, 5),
        )


class Wave:
    """Room for ``count`` cells of ``cell`` rows each, taken from ``room``, bytes that waves share."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layout: BlobLayout,
        count: int,
        cell: int,
        room: Tensor,
        table: Tensor,
    ) -> None:
        self.config, self.weights, self.layout = config, weights, layout
        self.rule = config.memory.make_rule()
        self.count, self.cell = count, cell
        self.table = table
        self._room, self._taken = room, 0
        c, compute = config, weights.first.dtype
        many, d, chunks = count * cell, config.dim, cell // config.chunk
        heads, depth, L = c.heads, c.memory.depth, c.chunk

        def rows_of(width: int) -> Tensor:
            return self._take((many, width), compute)

        self.u = rows_of(d)
        self.first = rows_of(weights.first.shape[1])
        self.made = rows_of(3 * d)
        self.read = rows_of(d)
        self.m = rows_of(d)
        self.hidden = rows_of(c.ffn)
        if c.variant != "lmm":
            self.attended, self.y = rows_of(d), rows_of(d)
        if c.variant == "mac":
            self.h, self.context, self.streams = rows_of(d), rows_of(2 * d), rows_of(4 * d)
        if c.variant == "mal":
            self.context = rows_of(3 * d)
        self.logits = self._take((count, weights.gates.shape[2], cell), torch.float32)
        cells = (count, chunks, heads)
        self.decays = cell_gates.CellDecays(
            self._take((*cells, depth, cell_gates.VECTORS, L), torch.float32),
            self._take((*cells, depth, L, L), compute),
        )
        self.work = self._take((count, heads, 2 * (L + c.head_dim), self.width), compute)
        self.trace = self._take((*cells, summary.TRACED + 2 * depth), torch.float32)
        self.norms = self._take((*cells, depth, L), torch.float32)

    @property
    def width(self) -> int:
        return self.config.memory_shapes[-1][1]

    @property
    def needed(self) -> int:
        """Bytes of room."""
        return self._taken

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        start, self._taken = self._taken, self._taken + -(-size // 256) * 256
        if self._room.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._room[start : start + size].view(dtype).view(shape)

    def _each(self, name: str, layout: BlobLayout | None = None) -> list[tuple[int, int]]:
        """Of every memory layer."""
        return [_at(layout or self.layout, f"{name}.{i}") for i in range(self.config.memory.depth)]

    def run(self, tokens: Tokens, opened: BlobLayout | None = None) -> None:
        """Take every cell of ``table`` through its layer: the residual stream and the state move. With
        ``opened``, the layout of an open chunk, the state doesn't: what comes after the cell's last token is
        computed from the open chunk."""
        w, c = self.weights, self.config
        self._norm("norm", tokens, w.norm_mixer)
        gemm(self.u, w.first, *self._cells, self.first)
        getattr(self, f"_{c.variant}")(tokens, opened)
        gemm(self.u, w.up, *self._cells, self.hidden, "swiglu")
        gemm(self.hidden, w.down, *self._cells, tokens.residual, "add")
        if opened is None:
            summary.summarize(self.trace, tokens.summary, self.table, c.chunk)

    def _mac(self, tokens: Tokens, opened: BlobLayout | None) -> None:
        c, w, d = self.config, self.weights, self.config.dim
        assert w.attention is not None and w.attended is not None and w.streams is not None
        self._convolve(self.first, 0, self.read, 0, c.heads)
        recall.recall(
            self.read,
            self.h,
            w.head_norm,
            self._each("segment_memory"),
            self._each("memory"),
            c.segment,
            opened is None,
            self.width,
            self.rule.architecture,
            c.norm_epsilon,
            *self._cells,
        )
        gemm(self.h, w.attention, *self._cells, self.context)
        self._rotate(tokens, self.first, d, 2 * c.heads)
        self._rotate(tokens, self.context, 0, c.heads)
        self._attend(self.first, d, self.context)
        gemm(self.attended, w.attended, *self._cells, self.y)
        gemm(self.y, w.streams, *self._cells, self.streams)
        self._convolve(self.streams, 0, self.made, d, 2 * c.heads)
        self._learn(self.y, self.streams, 3 * d, (0, d, 2 * d), opened)
        self._mix(tokens)
        self._keep(self.first, 2 * d, 3 * d, "keys", "values", opened)
        self._keep(self.context, 0, d, "memory_keys", "memory_values", opened)
        self._keep_tails(opened, (self.first, 0, 0, d), (self.streams, 0, d, 3 * d))
        if opened is None:
            size = math.prod(c.memory_shapes[-1])
            memory, start = self._each("memory"), self._each("segment_memory")
            segment_end.end_segments(memory, start, c.heads, size, c.segment, self.table, c.chunk)

    def _mag(self, tokens: Tokens, opened: BlobLayout | None) -> None:
        c, w, d = self.config, self.weights, self.config.dim
        assert w.attended is not None
        self._convolve(self.first, 3 * d, self.made, 0, 2 * c.heads)
        self._learn(self.u, self.first, 6 * d, (d, 0, 2 * d), opened)
        self._rotate(tokens, self.first, 0, 2 * c.heads)
        self._attend(self.first, 0, None)
        gemm(self.attended, w.attended, *self._cells, self.y)
        self._mix(tokens)
        self._keep(self.first, d, 2 * d, "keys", "values", opened)
        self._keep_tails(opened, (self.first, 3 * d, 0, 3 * d))

    def _mal(self, tokens: Tokens, opened: BlobLayout | None) -> None:
        c, w, d = self.config, self.weights, self.config.dim
        assert w.attention is not None and w.attended is not None and w.norm_attention is not None
        self._convolve(self.first, 0, self.made, 0, 2 * c.heads)
        self._learn(self.u, self.first, 3 * d, (d, 0, 2 * d), opened)
        self._norm("between", tokens, w.norm_attention, rows.Operands(y=self.m))
        gemm(self.u, w.attention, *self._cells, self.context)
        self._rotate(tokens, self.context, 0, 2 * c.heads)
        self._attend(self.context, 0, None)
        gemm(self.attended, w.attended, *self._cells, self.y)
        self._norm("add", tokens, w.norm_ffn, rows.Operands(m=self.y))
        self._keep(self.context, d, 2 * d, "keys", "values", opened)
        self._keep_tails(opened, (self.first, 0, 0, 3 * d))

    def _lmm(self, tokens: Tokens, opened: BlobLayout | None) -> None:
        c, d = self.config, self.config.dim
        self._convolve(self.first, 0, self.made, 0, 2 * c.heads)
        self._learn(self.u, self.first, 3 * d, (d, 0, 2 * d), opened)
        self._norm("add", tokens, self.weights.norm_ffn, rows.Operands(m=self.m))
        self._keep_tails(opened, (self.first, 0, 0, 3 * d))

    @property
    def _cells(self) -> tuple[Tensor, int, int]:
        return self.table, self.cell, self.config.chunk

    def _norm(
        self, kind: rows.Kind, tokens: Tokens, weight: Tensor, operands: rows.Operands = rows.NOTHING
    ) -> None:
        epsilon = self.config.norm_epsilon
        rows.rows(kind, tokens.residual, self.u, weight, *self._cells, epsilon, operands)

    def _mix(self, tokens: Tokens) -> None:
        """MAG, MAC: the gate of attention and memory, added to the stream, and the norm of what follows."""
        w = self.weights
        kind: rows.Kind = "gate" if self.config.gate == "default" else "paper"
        mixed = rows.Operands(self.y, self.m, w.norm_attention, w.norm_memory)
        self._norm(kind, tokens, w.norm_ffn, mixed)

    def _convolve(self, x: Tensor, column: int, out: Tensor, channel: int, keys: int) -> None:
        weight, head_dim = self.weights.conv, self.config.head_dim
        tails = _at(self.layout, "tails")
        streams.convolve(x, column, out, weight, channel, keys, tails, *self._cells, head_dim)

    def _keep_tails(self, opened: BlobLayout | None, *parts: tuple[Tensor, int, int, int]) -> None:
        _, taps, channels = self.weights.conv.shape
        kept = None if opened is None else _at(opened, "tails")
        tails, head_dim = _at(self.layout, "tails"), self.config.head_dim
        streams.keep_tails(parts, channels, taps, tails, kept, *self._cells, head_dim)

    def _rotate(self, tokens: Tokens, x: Tensor, column: int, heads: int) -> None:
        streams.rotate(x, column, heads, tokens.cos, tokens.sin, *self._cells)

    def _held(self, keys: str, values: str) -> attention.Held:
        return attention.Held(_at(self.layout, keys), _at(self.layout, values))

    def _attend(self, x: Tensor, column: int, context: Tensor | None) -> None:
        c, w = self.config, self.weights
        assert w.persistent_k is not None and w.persistent_v is not None
        attention.attend(
            x,
            column,
            context,
            w.persistent_k,
            w.persistent_v,
            self.attended,
            self._held("keys", "values"),
            None if context is None else self._held("memory_keys", "memory_values"),
            c.window if context is None else c.segment,
            *self._cells,
        )

    def _keep(
        self, x: Tensor, keys: int, values: int, k_name: str, v_name: str, opened: BlobLayout | None
    ) -> None:
        c, segment = self.config, self.config.variant == "mac"
        if opened is not None:
            for column, name in ((keys, k_name), (values, v_name)):
                place = _at(opened, name)
                open_chunk.open_rows(x, column, place, self.table, self.cell, c.heads, c.dim)
            return
        rows_held = c.segment if segment else c.window
        attention.keep(
            x, keys, values, self._held(k_name, v_name), rows_held, segment, *self._cells, c.head_dim, c.dim
        )

    def _learn(
        self, u: Tensor, gates: Tensor, column: int, columns: tuple[int, int, int], opened: BlobLayout | None
    ) -> None:
        """From ``made`` to ``m``: gates of ``u``, output gate of ``gates`` at ``column``; ``columns`` of k, q
        and v."""
        c, w, m = self.config, self.weights, self.config.memory
        assert m.eta_max is not None and m.alpha_max is not None
        cell_gates.gate_logits(u, w.gates, w.gate_bias, self.logits, *self._cells)
        limits = (m.theta_max, m.eta_max, m.alpha_max)
        cell_gates.cell_decays(self.logits, self.decays, limits, m.gate_epsilon, *self._cells)
        cached = None
        if opened is not None:
            decay, gate_rows = _at(opened, "decay"), _at(opened, "rows")
            open_chunk.open_decays(self.decays, decay, gate_rows, self.table, self.cell)
            cached = learn.Cached(self._each("inputs", opened), self._each("deltas", opened))
        learn.learn(
            self.made,
            columns,
            gates,
            column,
            self.decays,
            self.work,
            w.head_norm,
            self.read,
            self.trace,
            self.norms,
            learn.Where(self._each("memory"), self._each("momentum")),
            cached,
            self.width,
            self.rule.architecture,
            m.clip,
            c.norm_epsilon,
            GAIN_EVERY,
            self.table,
            self.cell,
        )
        gemm(self.read, w.output, *self._cells, self.m)


def _at(layout: BlobLayout, name: str) -> tuple[int, int]:
    """Offset and layer stride of a tensor, in bytes."""
    place = layout.places[name]
    return place.offset, place.stride
