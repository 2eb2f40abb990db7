"""How large something may be that was too large before. Pure policy; knows neither what it bounds nor why it
failed."""

from __future__ import annotations

PATIENCE = 256
"""Successes after which twice as much is tried: a failure costs far more than a small step."""


class Cap:
    """A bound that halves at a failure, and doubles again after many successes."""

    def __init__(self, most: int) -> None:
        self.value = self._most = most
        self._good = 0

    def failed(self, size: int) -> None:
        """``size`` (2 or more) was too much."""
        self.value = max(1, min(self.value, size // 2))
        self._good = 0

    def succeeded(self) -> None:
        self._good += 1
        if self._good >= PATIENCE:
            self.value = min(self._most, 2 * self.value)
            self._good = 0
