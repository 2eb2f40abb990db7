"""What the engine says of the memory while it reads, made small. Owns the sums; knows no session."""

from __future__ import annotations

from typing import Any

from mnemosyne.engine.messages import Progress


class Trace:
    """Means over the chunks of any number of Progress messages, and the largest gain. Give ``add`` to the
    engine as ``on_progress``."""

    def __init__(self) -> None:
        self.chunks = 0
        self.position = 0
        """End of the newest chunk."""
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self.gain: float | None = None
        """The largest; None where no chunk's was measured (``engine.trace.GAIN_EVERY``)."""

    def add(self, progress: Progress) -> None:
        for chunk in progress.trace:
            self.chunks += 1
            self.position = chunk.position
            values = (chunk.surprise, chunk.momentary, chunk.moved, chunk.written)
            self._sums = [total + value for total, value in zip(self._sums, values, strict=True)]
            if chunk.gain is not None:
                self.gain = max(chunk.gain, self.gain or 0.0)

    @property
    def surprise(self) -> float | None:
        return self._sums[0] / self.chunks if self.chunks else None

    def data(self) -> dict[str, Any]:
        """For a ``surprise`` event; of the chunks up to ``position``."""
        names = ("surprise", "momentary", "moved", "written")
        means = {name: total / self.chunks for name, total in zip(names, self._sums, strict=True)}
        return {"position": self.position, "chunks": self.chunks, **means, "gain": self.gain}
