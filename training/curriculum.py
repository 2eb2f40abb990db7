"""How hard the rows are: noise rises while far answers are right, and rows grow with it. Knows no tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Curriculum:
    stages: list[tuple[int, float]]
    """(row length, noise up to which it is used), rising."""
    promote: float
    """Accuracy on far answers from which noise rises."""
    noise: float
    noise_max: float

    @property
    def length(self) -> int:
        return next((length for length, until in self.stages if self.noise < until), self.stages[-1][0])

    def observe(self, accuracy: float) -> None:
        """Take the accuracy on far answers since the last call, and move the noise."""
        if accuracy >= self.promote:
            self.noise = min(self.noise_max, self.noise * 1.15 + 1.5)
        elif accuracy < self.promote - 0.35:
            self.noise *= 0.9  # what was too hard is met again later
