"""What the engine says of the memory while it reads, made small. Owns the sums; knows no session."""

from __future__ import annotations

from typing import Any

import numpy as np

from mnemosyne.engine.messages import Progress

MEANS = ("surprise", "momentary", "moved", "written")


class Trace:
    """Means over the chunks of any number of Progress messages, and the largest gain. Give ``add`` to the
    engine as ``on_progress``."""

    def __init__(self) -> None:
        self.chunks = 0
        self.position = 0
        """End of the newest chunk."""
        self._sums = np.zeros(len(MEANS))
        self.gain: float | None = None
        """The largest; None where no chunk's was measured (``engine.trace.GAIN_EVERY``)."""

    def add(self, progress: Progress) -> None:
        trace = progress.trace
        if not len(trace):
            return
        self.chunks += len(trace)
        self.position = int(trace.column("position")[-1])
        # One after the other, so that the sums don't depend on how the chunks came.
        columns = np.stack([trace.column(name) for name in MEANS], 1)
        self._sums = np.cumsum(np.vstack([self._sums, columns]), 0)[-1]
        gains = trace.column("gain")
        known = gains[~np.isnan(gains)].tolist()
        if known:
            self.gain = max(*known, self.gain or 0.0)

    @property
    def surprise(self) -> float | None:
        return float(self._sums[0]) / self.chunks if self.chunks else None

    def data(self) -> dict[str, Any]:
        """For a ``surprise`` event; of the chunks up to ``position``."""
        means = {name: total / self.chunks for name, total in zip(MEANS, self._sums.tolist(), strict=True)}
        return {"position": self.position, "chunks": self.chunks, **means, "gain": self.gain}
