"""An open chunk as the kernels of decode take it: one allocation, beside the state it stands on.

Owns what lies in it. Nothing committed is copied in: attention and memory read the state's own allocation,
and only what the chunk's tokens made is here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.blob import BlobLayout
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.state import SessionState
from mnemosyne.kernels.decode import cache_shapes

OVERWRITTEN = ("tails", "decay", "rows")
"""First in an open chunk (``overwritten_bytes``)."""


def open_layout(config: ModelConfig, compute: torch.dtype) -> BlobLayout:
    """Layers first; d ``dim``, H heads, D head_dim, S conv streams, L chunk. Of a chunk's L rows those of its
    tokens count, and what stands in the others doesn't matter.

    - ``tails`` `[K - 1, S d]`: the newest rows of the streams, as in the state;
    - ``decay`` `[3, H, depth]` fp32: A, F, E after the newest token;
    - ``rows`` `[2, H, depth, L]` fp32: the rows of G and P after it (``kernels.gates.Decays``);
    - ``keys``, ``values``, for MAC ``memory_keys``, ``memory_values`` `[H, L, D]`: the chunk's own, rotated;
    - ``inputs.i`` `[H, L, in]`, ``deltas.i`` `[H, L, out]`: both sides of each token's gradient, clipped.

    With no token in the chunk nothing of it counts: a step at index 0 takes the tails from the state.
    """
    c, layers = config, config.layers
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    streams = 4 if c.variant == "mac" else 3
    shapes["tails"] = ((layers, c.conv - 1, streams * c.dim), compute)
    caches = cache_shapes(c.heads, c.chunk, c.memory_shapes, momentum=True)
    for name in OVERWRITTEN[1:]:
        shapes[name] = ((layers, *caches.pop(name)), torch.float32)
    attended = {"mac": ("keys", "values", "memory_keys", "memory_values"), "lmm": ()}
    for name in attended.get(c.variant, ("keys", "values")):
        shapes[name] = ((layers, c.heads, c.chunk, c.head_dim), compute)
    for name, shape in caches.items():
        shapes[name] = ((layers, *shape), compute)
    return BlobLayout(shapes)


def overwritten_bytes(layout: BlobLayout) -> int:
    """Of an open chunk, from its first on: what a step changes. All else that it writes is its token's own
    row, where nothing counts before it."""
    place = layout.places[OVERWRITTEN[-1]]
    return place.offset + place.stride * place.shape[0]


class BlobChunk(OpenChunk):
    """Both allocations are the chunk's to keep alive: kernels know them by address."""

    def __init__(
        self, committed: SessionState, tokens: tuple[int, ...], kinds: bytes, state_blob: Tensor, blob: Tensor
    ) -> None:
        super().__init__(committed, tokens, kinds)
        self.state_blob = state_blob
        """uint8, the committed tensors by ``BlobLayout(state_layout(...))``; never written."""
        self.blob = blob
        """uint8, by ``open_layout``; written by every step."""
        self.addresses = (state_blob.data_ptr(), blob.data_ptr())
