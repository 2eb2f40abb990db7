"""Attention of one layer: over a sliding window (MAG, MAL) or a segment (MAC), with persistent tokens.

Owns its projections and the layer's persistent tokens. Of the state it knows ``keys`` and ``values`` (and,
for MAC, ``memory_keys`` and ``memory_values``); it knows no memory. Source: Titans 4.1-4.3, spec/memory.md 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.layers import Dense, dense
from mnemosyne.engine.memory import State
from mnemosyne.kernels import fusion
from mnemosyne.kernels.attention import one_row, segment_block, window_blocks
from mnemosyne.kernels.positions import rotary_angles, rotate


class Places(NamedTuple):
    """Where the tokens of a call stand."""

    start: Tensor
    """`[B]` int64, absolute index of each session's first token."""
    cos: Tensor
    """`[B, 1, T, head_dim / 2]`, of absolute positions; for MAC of positions in the segment."""
    sin: Tensor

    @classmethod
    def of(cls, config: ModelConfig, start: Tensor, length: int, dtype: torch.dtype) -> Places:
        positions = start[:, None] + torch.arange(length, device=start.device)
        if config.variant == "mac":
            positions = positions % config.segment
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta, dtype)
        return cls(start, cos.unsqueeze(1), sin.unsqueeze(1))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.project = Dense(config.dim, 3 * config.dim)
        self.output = Dense(config.dim, config.dim)
        self.persistent = nn.Parameter(torch.randn(config.persistent, config.dim))

    def heads(self, x: Tensor, first: int, count: int) -> list[Tensor]:
        """``count`` of q, k, v from ``first`` on, of ``x`` `[B, T, dim]`: `[B, H, T, head_dim]` each."""
        c = self.config
        weight = self.project.weight.to(self.project.compute)
        part = dense(x, weight[first * c.dim : (first + count) * c.dim])
        split = part.view(*x.shape[:2], count, c.heads, c.head_dim).permute(2, 0, 3, 1, 4).contiguous()
        return list(split.unbind(0))

    def persistent_heads(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[H, P, head_dim]` of the persistent tokens; they carry no position."""
        k, v = self.heads(self.persistent.unsqueeze(0), 1, 2)
        return k[0], v[0]

    def merge(self, y: Tensor) -> Tensor:
        B, H, T, d = y.shape
        return self.output(y.transpose(1, 2).reshape(B, T, H * d))

    def window(self, u: Tensor, state: State, places: Places) -> tuple[Tensor, State]:
        """Whole chunks ``u`` `[B, T, dim]`; output, and keys, values `[B, H, W + T, head_dim]` to cache."""
        q, rows = self._placed(u, state, places)
        y = window_blocks(
            q, rows["keys"], rows["values"], *self.persistent_heads(), places.start, self.config.chunk
        )
        for name, tensor in rows.items():
            state[name] = tensor[:, :, -self.config.window :]
        return self.merge(y), rows

    def _placed(self, u: Tensor, state: State, places: Places) -> tuple[Tensor, State]:
        """Queries `[B, H, T, head_dim]`, and keys and values `[B, H, W + T, head_dim]` behind the state's."""
        if fusion.fuses(u):
            from mnemosyne.kernels.triton.train_heads import heads

            q, k, v = heads(self.project(u), state["keys"], state["values"], places.cos, places.sin)
            return q, {"keys": k, "values": v}
        q, k, v = self.heads(u, 0, 3)
        q, k = rotate(q, places.cos, places.sin), rotate(k, places.cos, places.sin)
        rows = {"keys": torch.cat([state["keys"].to(k.dtype), k], 2)}
        rows["values"] = torch.cat([state["values"].to(v.dtype), v], 2)
        return q, rows

    def window_step(self, u: Tensor, cache: State, index: Tensor, places: Places) -> Tensor:
        """One token a session, ``u`` `[B, 1, dim]`, at ``index[b]`` of its chunk; writes its cache row."""
        W = self.config.window
        q, k, v = self.heads(u, 0, 3)
        q, k = rotate(q, places.cos, places.sin), rotate(k, places.cos, places.sin)
        sessions = torch.arange(u.shape[0], device=u.device)
        cache["keys"][sessions, :, W + index] = k[:, :, 0]
        cache["values"][sessions, :, W + index] = v[:, :, 0]
        persistent_k, persistent_v = self.persistent_heads()
        column = torch.arange(W + self.config.chunk, device=u.device)
        row = W + index[:, None]
        # places.start is the token's own position here: the column before which no token stands.
        seen = (column <= row) & (column > row - W) & (column >= row - places.start[:, None])
        return self._one(q, cache["keys"], cache["values"], persistent_k, persistent_v, seen)

    def _one(
        self, q: Tensor, k: Tensor, v: Tensor, persistent_k: Tensor, persistent_v: Tensor, seen: Tensor
    ) -> Tensor:
        B, H, _, d = q.shape
        P = persistent_k.shape[1]
        mask = torch.cat([torch.ones(B, P, dtype=torch.bool, device=q.device), seen], 1)
        k = torch.cat([persistent_k.expand(B, H, P, d), k], 2)
        v = torch.cat([persistent_v.expand(B, H, P, d), v], 2)
        return self.merge(one_row(q, k, v, mask))

    def segment_rows(self, x: Tensor, h: Tensor, rows: State, offset: Tensor, places: Places) -> Tensor:
        """MAC: project ``x`` and ``h`` `[B, T, dim]`, put their keys and values at ``offset`` of the
        segment's buffers ``rows`` (changed in place); the queries `[B, H, T, head_dim]`."""
        q, k, v = self.heads(x, 0, 3)
        hk, hv = self.heads(h, 1, 2)
        q, k, hk = (rotate(t, places.cos, places.sin) for t in (q, k, hk))
        sessions = torch.arange(x.shape[0], device=x.device)[:, None]
        at = offset[:, None] + torch.arange(x.shape[1], device=x.device)
        for name, tensor in (("keys", k), ("values", v), ("memory_keys", hk), ("memory_values", hv)):
            rows[name] = (
                rows[name]
                .to(tensor.dtype)
                .transpose(1, 2)
                .index_put((sessions, at), tensor.transpose(1, 2))
                .transpose(1, 2)
                .contiguous()
            )
        return q

    def segment(self, q: Tensor, rows: State, offset: Tensor) -> Tensor:
        """MAC: output `[B, T, dim]` of queries that stand at ``offset`` of the segment held in ``rows``."""
        y = segment_block(
            q,
            (rows["memory_keys"], rows["keys"]),
            (rows["memory_values"], rows["values"]),
            *self.persistent_heads(),
            offset,
        )
        return self.merge(y)
