"""Tensors of one session in one allocation: where each of them begins. Owns offsets; knows no kernel.

Kernels are given an address for each session and find its tensors by these offsets, so that sessions sit
anywhere, a batch is never gathered, and moving a session is one copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.state import state_layout

ALIGNMENT = 256
"""Bytes; every tensor begins at a multiple of it."""

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape with the layers first, dtype)."""


@dataclass(frozen=True)
class Place:
    """Of one tensor in a blob."""

    offset: int
    """Bytes before its first layer."""
    stride: int
    """Bytes from one layer to the next."""
    shape: tuple[int, ...]
    dtype: torch.dtype


class BlobLayout:
    def __init__(self, shapes: Shapes) -> None:
        self.places: dict[str, Place] = {}
        at = 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            self.places[name] = Place(at, size // shape[0], shape, dtype)
            at += -(-size // ALIGNMENT) * ALIGNMENT
        self.nbytes = at

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def views(self, blob: Tensor) -> dict[str, Tensor]:
        """Every tensor of ``blob`` `[nbytes]` uint8."""
        return {
            name: blob[p.offset : p.offset + p.stride * p.shape[0]].view(p.dtype).view(p.shape)
            for name, p in self.places.items()
        }

    def blob_of(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The blob that ``tensors`` are the views of; None where they lie otherwise."""
        storage = tensors[next(iter(self.places))].untyped_storage()
        if storage.nbytes() != self.nbytes:
            return None
        right = all(
            tensors[name].data_ptr() == storage.data_ptr() + p.offset
            and tensors[name].shape == p.shape
            and tensors[name].dtype == p.dtype
            and tensors[name].is_contiguous()
            for name, p in self.places.items()
        )
        if not right:
            return None
        blob = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return blob.set_(storage, 0, (self.nbytes,), (1,))

    def pack(self, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """The blob of ``tensors``; a new one where they aren't one's views on ``device``."""
        blob = self.blob_of(tensors)
        if blob is not None and blob.device == device:
            return blob
        blob = self.empty(device)
        for name, view in self.views(blob).items():
            view.copy_(tensors[name])
        return blob


def gpu_layout(config: ModelConfig, compute: torch.dtype) -> BlobLayout:
    """Of a session's committed state. Momentum is in the compute precision: it costs the memory no digit that
    bf16 operands leave it, and a quarter fewer bytes are moved (docs/log.md)."""
    return BlobLayout(state_layout(config, compute, torch.float32, compute))
