"""How fast tokens are read here. Owns one running measure; knows nothing else."""

from __future__ import annotations

FIRST_GUESS = 2000.0
"""Tokens a second until something was measured."""
ENOUGH = 256
"""Fewer tokens than this say little about speed."""
_WEIGHT = 0.3


class Pace:
    def __init__(self) -> None:
        self.tokens_per_second = FIRST_GUESS

    def measured(self, tokens: int, seconds: float) -> None:
        if tokens >= ENOUGH and seconds > 0:
            self.tokens_per_second += _WEIGHT * (tokens / seconds - self.tokens_per_second)
