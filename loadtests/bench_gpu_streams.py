"""What every stream of the HTTP bench asks, and how its times become numbers. Knows no server and no engine.

TTFT is from just before the request to the first token; ITL is (last token - first token) / (tokens - 1), one
sample an answer.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

Sample = tuple[float, float]
"""TTFT and ITL of one answer, seconds."""


@dataclass(frozen=True)
class Asked:
    context: int = 1024
    """Tokens that each session has read before."""
    prompt: int = 32
    answer: int = 64
    """Tokens of an answer."""
    rounds: int = 4
    """Answers of each stream, one after the other; one more before the clock starts."""
    counts: tuple[int, ...] = (1, 64, 256)
    """Streams at once."""
    piece: int = 262_144
    """Tokens of the reading session in one request of the engine: more than it takes in a step, as the
    server's own pieces are."""


TOY = Asked(context=32, prompt=5, answer=6, rounds=2, counts=(1, 3), piece=512)


@dataclass(frozen=True)
class Measured:
    """Of as many streams at once, with or without a session that reads beside them."""

    streams: int
    beside: bool
    samples: list[Sample]
    read: float
    """Tokens a second that the reading session took in meanwhile; 0 without one."""

    @property
    def first(self) -> float:
        """TTFT, the median."""
        return statistics.median(first for first, _ in self.samples)

    @property
    def between(self) -> float:
        """ITL, the median."""
        return statistics.median(between for _, between in self.samples)

    def facts(self) -> dict[str, float]:
        firsts, betweens = (sorted(each) for each in zip(*self.samples, strict=True))
        late = min(len(firsts) - 1, round(0.99 * len(firsts)))
        return {
            "ttft_seconds": self.first,
            "ttft_p99_seconds": firsts[late],
            "itl_seconds": self.between,
            "itl_p99_seconds": betweens[late],
            "answers": len(self.samples),
            "read_tokens_per_second": self.read,
        }


def sample(began: float, arrivals: list[float]) -> Sample:
    """Of an answer whose tokens came at ``arrivals``, two at least."""
    return arrivals[0] - began, (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)
