"""Which cells make a wave. Pure numbers: knows positions and lengths, no tensor and no model.

A cell, one block of a session in one layer, waits for the same block in the layer below and for the block
before it in its own. So blocks and layers with the same sum form a diagonal that runs at once: one long
stream keeps as many cells busy as there are layers (diagonal batching, arXiv 2506.05229), and sessions add
up. Since nothing passes between the cells of a wave, how a diagonal is cut into waves changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mnemosyne.engine.config import ModelConfig

BLOCK_CHUNKS = 8
"""Chunks of a cell where the block form doesn't say it (MAC's cells are segments)."""

Cells = NDArray[np.int64]
"""`[cells, 5]`: session, layer, its first token in the call, its chunks, its first absolute position."""


@dataclass(frozen=True)
class Read:
    """What one session reads in a call."""

    position: int
    """Where it stands."""
    tokens: int


def blocks(read: Read, size: int, chunk: int) -> NDArray[np.int64]:
    """`[blocks, 3]`: first token, chunks, absolute position; cut where the absolute position is a multiple of
    ``size`` tokens."""
    edges = [0, *range(size - read.position % size, read.tokens, size), read.tokens]
    first = np.array(edges, np.int64)
    return np.stack([first[:-1], np.diff(first) // chunk, first[:-1] + read.position], 1)


def waves(reads: Sequence[Read], layers: int, size: int, chunk: int, most: int) -> Iterator[Cells]:
    """Every cell of a call once, in waves of at most ``most``, each after those that it waits for."""
    cut = [blocks(read, size, chunk) for read in reads]
    sessions = np.repeat(np.arange(len(cut)), [len(b) for b in cut])
    every = np.concatenate(cut)
    index = np.concatenate([np.arange(len(b)) for b in cut])
    for diagonal in range(int(index.max(initial=-1)) + layers):
        layer = diagonal - index
        here = np.flatnonzero((layer >= 0) & (layer < layers))
        # Cells of one layer side by side: they share its weights.
        here = here[np.argsort(layer[here], kind="stable")]
        cells = np.column_stack([sessions[here], layer[here], every[here]])
        # Waves of one size: a small one would leave the device idle as often as a large one.
        for wave in np.array_split(cells, -(-len(cells) // most)):
            # The longest first: short ones fill up what is idle at a kernel's end.
            yield wave[np.argsort(-wave[:, 3], kind="stable")]


def cell_rows(config: ModelConfig) -> int:
    """Rows of a cell: a segment, or as many chunks as keep a GPU busy."""
    return config.segment if config.variant == "mac" else BLOCK_CHUNKS * config.chunk
