"""What reading did to the memory, chunk by chunk, from the first token on and in constant space.

Owns the means over 1, 2, 4, ... chunks and which of them are kept; knows no tensor, model or session. Level k
has a point for every 2^k chunks, counted from a session's first, and keeps the newest ``POINTS`` of them: the
past is kept the more coarsely the longer ago it is. A point is made of the two below it, so it doesn't depend
on how the chunks came (spec/memory.md 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FIELDS = ("surprise", "momentary", "moved", "gain")
"""What is known of a chunk, per layer; points are means, those of the last the largest that is known."""
GAIN = FIELDS.index("gain")
POINTS = 256
LEVELS = 16
"""The last level reaches back over 8 million chunks: 537 million tokens at 64 a chunk."""

Values = NDArray[np.float32]
"""`[..., layers, fields]`; NaN where nothing is known."""


class Point(NamedTuple):
    first: int
    """Chunks [first, last) of the session."""
    last: int
    values: Values
    """`[layers, fields]`."""


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Moved by replacement, like the state that it belongs to. Without levels it keeps nothing, ever."""

    chunks: int = 0
    """Chunks since the session's first token."""
    kept: tuple[Values, ...] = ()
    """``levels``, without the newest chunks."""
    newest: tuple[Values, ...] = ()
    """Those, in the order of time, fewer than POINTS: whoever reads seldom looks, and levels take as long to
    move by one chunk as by many."""

    @classmethod
    def blank(cls, layers: int, chunks: int = 0) -> Pyramid:
        """Of ``chunks`` chunks of which nothing is known."""
        level = np.full((POINTS, layers, len(FIELDS)), np.nan, np.float32)
        return cls(chunks, (level,) * LEVELS)

    @staticmethod
    def shape(layers: int) -> tuple[int, int, int, int]:
        """Of what ``array`` gives."""
        return LEVELS, POINTS, layers, len(FIELDS)

    @classmethod
    def of(cls, chunks: int, levels: Values) -> Pyramid:
        """What ``array`` gave, `[LEVELS, POINTS, layers, fields]`."""
        return cls(chunks, tuple(np.array(level, np.float32) for level in levels))

    def array(self) -> Values:
        """`[LEVELS, POINTS, layers, fields]`; equal pyramids are equal bytes."""
        stacked = np.stack(self.levels)
        stacked[np.isnan(stacked)] = np.nan
        return stacked

    @cached_property
    def levels(self) -> tuple[Values, ...]:
        """Level k `[POINTS, layers, fields]`: point i, of the chunks [i 2^k, (i + 1) 2^k), at i % POINTS."""
        if not self.newest:
            return self.kept
        new = np.concatenate(self.newest)
        levels, start = list(self.kept), self.chunks - len(new)
        for k, level in enumerate(self.kept):
            if not len(new):
                break
            last = new[-POINTS:]
            stop = start + len(new)
            levels[k] = level.copy()
            levels[k][np.arange(stop - len(last), stop) % POINTS] = last
            if start % 2:
                start -= 1
                new = np.concatenate([level[None, start % POINTS], new])
            start, new = start // 2, _joined(new[: len(new) // 2 * 2])
        return tuple(levels)

    @property
    def nbytes(self) -> int:
        """Of the levels. Besides, the newest chunks take at most a sixteenth of it; and while a pyramid that
        was looked at lives, so do the levels that they changed."""
        return sum(level.nbytes for level in self.kept)

    def extended(self, values: Values) -> Pyramid:
        """With n more chunks, `[n, layers, fields]`."""
        chunks = self.chunks + len(values)
        if not self.kept:
            return Pyramid(chunks)
        more = Pyramid(chunks, self.kept, (*self.newest, values.copy()))
        return more if sum(map(len, more.newest)) < POINTS else Pyramid(chunks, more.levels)

    def cover(self, first: int, last: int, level: int) -> Iterator[Point]:
        """The points, of 2^level chunks each, that the chunks [first, last) are in, in order.

        What is too long ago for that has coarser points; the newest chunks, where they don't fill a point,
        have a shorter one. Chunks of which nothing is known or kept are left out.
        """
        at = first >> level << level
        while self.levels and at < min(last, self.chunks):
            k = next((k for k in range(level, LEVELS) if at >> k >= self._oldest(k)), None)
            if k is None:
                at = self._oldest(LEVELS - 1) << LEVELS - 1
                continue
            if at >> k < self.chunks >> k:
                found = self.levels[k][(at >> k) % POINTS]
                point = Point(at >> k << k, (at >> k) + 1 << k, found)
            else:
                point = Point(at, self.chunks, self._rest(at))
            at = point.last
            if not np.isnan(point.values[:, :GAIN]).all():
                yield point

    def _oldest(self, k: int) -> int:
        return max(0, (self.chunks >> k) - POINTS)

    def _rest(self, at: int) -> Values:
        """Of the chunks from ``at`` on, from the longest whole points that they make."""
        parts, weights = [], []
        start = at
        for k in reversed(range(LEVELS)):
            if self.chunks - start >> k:
                parts.append(self.levels[k][(start >> k) % POINTS])
                weights.append(1 << k)
                start += 1 << k
        found = np.average(np.stack(parts), axis=0, weights=weights).astype(np.float32)
        found[:, GAIN] = np.fmax.reduce([part[:, GAIN] for part in parts])
        return found


def overall(values: Values) -> NDArray[np.float64]:
    """Of all layers together, `[..., fields]`."""
    found = values.mean(-2, dtype=np.float64)
    found[..., GAIN] = np.fmax.reduce(values[..., GAIN], axis=-1)
    return found


def _joined(values: Values) -> Values:
    """Pairs of points that lie side by side, `[2 n, ...]` to `[n, ...]`."""
    left, right = values[0::2], values[1::2]
    joined = (left + right) * np.float32(0.5)
    joined[..., GAIN] = np.fmax(left[..., GAIN], right[..., GAIN])
    return joined
