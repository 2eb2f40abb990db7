"""The central noun: what a session has become by reading. Owns the frozen types; knows no model, file or id.

A state is committed at chunk ends and is a function of the token sequence alone; after the last commit only
the tokens of the open chunk are kept, each with its kind. Nothing else may influence a logit. A whole chunk
is committed when a token after it arrives, not before: so the logits after the last token can always be
computed from what is pending, and no hidden vector needs to be kept beside the state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.errors import SnapshotCorrupt
from mnemosyne.engine.pyramid import Pyramid

INPUT = 0
"""Kind of a token that came from outside (prompts, documents)."""
GENERATED = 1
"""Kind of a token that the model emitted."""


@dataclass(frozen=True)
class SessionState:
    """One session's state, all tensors with the layers first. Advanced by replacement, never in place."""

    position: int
    """Committed tokens, a multiple of the chunk."""
    tensors: Mapping[str, Tensor]
    """Exactly the names, shapes and dtypes of ``state_layout``."""
    pending: tuple[int, ...] = ()
    """Token ids after the last commit: 1 to chunk of them, none only in a session that has read nothing."""
    kinds: bytes = b""
    """INPUT or GENERATED for each pending token."""
    pyramid: Pyramid = field(default_factory=Pyramid)
    """What the committed chunks did to the memory. It goes where the state goes, and influences no logit."""

    @property
    def tokens_seen(self) -> int:
        return self.position + len(self.pending)

    @property
    def nbytes(self) -> int:
        """Of the tensors and the pyramid; the same whatever was read."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values()) + self.pyramid.nbytes

    def digest(self) -> str:
        """SHA-256 over position, pending tokens, every tensor's bytes and the pyramid's: equal states, equal
        digests."""
        h = hashlib.sha256(f"{self.position}|{self.pending}|{self.kinds.hex()}".encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().contiguous().cpu()
            h.update(name.encode())
            h.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        if self.pyramid.levels:
            h.update(f"pyramid|{self.pyramid.chunks}".encode())
            h.update(self.pyramid.array().tobytes())
        return h.hexdigest()


def state_layout(
    config: ModelConfig,
    compute_dtype: torch.dtype,
    memory_dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype | None = None,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the committed tensors of one session; all of spec/memory.md section 6.
    Momentum has the memory's dtype unless another is given (``engine.gpu`` keeps it in the compute dtype)."""
    layers, heads, hd = config.layers, config.heads, config.head_dim
    momentum = config.memory.make_rule().algorithm.momentum
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for i, (out, inn) in enumerate(config.memory_shapes):
        layout[f"memory.{i}"] = ((layers, heads, out, inn), memory_dtype)
        if momentum:
            layout[f"momentum.{i}"] = ((layers, heads, out, inn), momentum_dtype or memory_dtype)
        if config.variant == "mac":
            layout[f"segment_memory.{i}"] = ((layers, heads, out, inn), memory_dtype)
    projections = 4 if config.variant == "mac" else 3
    layout["tails"] = ((layers, config.conv - 1, projections * config.dim), compute_dtype)
    if config.variant in ("mag", "mal"):
        kv = (layers, heads, config.window, hd)
        layout["keys"] = (kv, compute_dtype)
        layout["values"] = (kv, compute_dtype)
    if config.variant == "mac":
        kv = (layers, heads, config.segment, hd)
        for name in ("keys", "values", "memory_keys", "memory_values"):
            layout[name] = (kv, compute_dtype)
    return layout


def check_layout(
    tensors: Mapping[str, Tensor], layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Raise SnapshotCorrupt unless ``tensors`` has exactly the layout and every value is finite."""
    if set(tensors) != set(layout):
        missing, extra = sorted(set(layout) - set(tensors)), sorted(set(tensors) - set(layout))
        raise SnapshotCorrupt(f"state tensors differ: missing {missing}, unexpected {extra}")
    for name, (shape, dtype) in layout.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise SnapshotCorrupt(
                f"state tensor {name}: expected {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise SnapshotCorrupt(f"state tensor {name} holds a value that isn't finite")
