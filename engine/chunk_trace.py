"""What committed chunks did to the memory, for whoever asked for them to be read. Knows no model and no wire.

Many chunks are one array: a GPU commits tens of thousands a second, and an object for each took its host
longer than the GPU took to read them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ChunkTrace(NamedTuple):
    """Of one committed chunk: means over layers and heads (spec/memory.md 5)."""

    position: int
    """Absolute token index of the chunk's end."""
    surprise: float
    momentary: float
    moved: float
    gain: float | None
    """By how much the chunk may amplify a disturbance of the memory, the largest of the layers'; None where
    it wasn't measured."""
    written: float
    """Share of (layer, head, memory layer) cells that the chunk changed."""


FIELDS = ChunkTrace._fields


@dataclass(frozen=True, eq=False)
class ChunkTraces:
    """Chunks in their order; equal if all their numbers are."""

    values: NDArray[np.float64]
    """`[chunks, FIELDS]`, NaN for a gain that wasn't measured."""

    @classmethod
    def of(cls, chunks: Iterable[ChunkTrace]) -> ChunkTraces:
        rows = [[math.nan if value is None else value for value in chunk] for chunk in chunks]
        return cls(np.array(rows, np.float64).reshape(-1, len(FIELDS)))

    def column(self, name: str) -> NDArray[np.float64]:
        return self.values[:, FIELDS.index(name)]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[ChunkTrace]:
        for position, surprise, momentary, moved, gain, written in self.values.tolist():
            known = None if math.isnan(gain) else gain
            yield ChunkTrace(int(position), surprise, momentary, moved, known, written)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChunkTraces) and np.array_equal(self.values, other.values, equal_nan=True)

    def __hash__(self) -> int:
        return hash(len(self))


NO_CHUNKS = ChunkTraces.of(())
