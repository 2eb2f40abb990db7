"""One engine of a fleet: its name, whether it may be used, and how much it has to do. Knows no handle and
none of the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import EngineInfo

log = logging.getLogger(__name__)
READING = 1.0
"""What a request weighs until its first token: whoever reads takes all that the device gives. It weighs
nothing while its base is still being made."""
ANSWERING = 0.25
"""And from then on: those who decode share a step, and leave most of it to the readers."""
MEMORY_SECONDS = 1.0
"""How far back the average of the load reaches."""


class Share:
    """What one request weighs at its member."""

    def __init__(self, add: Callable[[float], None]) -> None:
        self._add, self._weight = add, 0.0
        self.ended = False

    def weigh(self, weight: float) -> None:
        """Nothing any more, once the request has ended."""
        if not self.ended:
            self._add(weight - self._weight)
            self._weight = weight


class Member:
    def __init__(self, name: str, engine: EngineLike, clock: Callable[[], float]) -> None:
        """``name`` is the device's, unique in the fleet; ``clock`` gives seconds."""
        self.name, self.engine = name, engine
        self.moved_in = self.moved_out = self.moves_failed = 0
        self._clock = clock
        self._now = self._mean = 0.0
        self._at = clock()
        self._like: EngineInfo | None = None
        self._compared = 0
        self._agrees = False

    def must_be_like(self, info: EngineInfo) -> None:
        """From now on it may be used only while it holds the same weights and computes alike."""
        self._like, self._compared = info, 0

    @property
    def usable(self) -> bool:
        if not self.engine.ready or self._like is None:
            return False
        if self._compared != self.engine.incarnation:
            # A restart may find another checkpoint in the folder, or choose another precision.
            self._compared = self.engine.incarnation
            difference = difference_between(self.engine.info, self._like)
            self._agrees = difference is None
            if difference is not None:
                log.error(
                    "%s isn't used from now on, it differs from the other devices: %s", self.name, difference
                )
        return self._agrees

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Of a request that reads, until it ends."""
        share = Share(self._add)
        share.weigh(READING)
        try:
            yield share
        finally:
            share.weigh(0.0)
            share.ended = True

    def others(self, own: float) -> float:
        """Its load without a session that asks now, of whose requests ``own`` is under way, in readers. A
        burst doesn't count. Nor does a lull: sessions that read beside each other come to the ends of their
        pieces in the same step."""
        self._add(0.0)
        return max(min(self._now - own, self._mean), self._mean - READING)

    @property
    def expected(self) -> float:
        """Its load, a lull of which doesn't count: a session that reads on pauses between two pieces."""
        self._add(0.0)
        return max(self._now, self._mean)

    def stats(self) -> dict[str, float]:
        return {
            "load": self.expected,
            "device_moves_in_total": self.moved_in,
            "device_moves_out_total": self.moved_out,
            "device_moves_failed_total": self.moves_failed,
        }

    def _add(self, weight: float) -> None:
        """Let the average catch up, like a machine's load average, then change what it follows."""
        now = self._clock()
        self._mean += (self._now - self._mean) * -math.expm1((self._at - now) / MEMORY_SECONDS)
        self._at = now
        self._now += weight


NAMES = {
    "up": "whether the device's engine runs: 1 or 0",
    "restarts_total": "times that the engine was started again after it had died",
    "load": "requests that read, and a quarter of those that answer, averaged over seconds",
    "device_moves_in_total": "states moved here from other devices",
    "device_moves_out_total": "states moved from here to other devices",
    "device_moves_failed_total": "states that couldn't be moved away and stayed",
}
"""What a device's stats have besides ``engine.counters``: name -> meaning."""


def difference_between(ours: EngineInfo, expected: EngineInfo) -> str | None:
    """Why a state of one wouldn't go on to the same bits in the other; None where it would."""
    if ours.model_fingerprint != expected.model_fingerprint:
        return f"its model is {ours.model_fingerprint[:12]} and not {expected.model_fingerprint[:12]}"
    if ours.numerics_fingerprint == expected.numerics_fingerprint:
        return None
    names = sorted(ours.numerics.keys() | expected.numerics.keys())
    pairs = [(name, ours.numerics.get(name), expected.numerics.get(name)) for name in names]
    differing = [f"{name} is {one} and not {other}" for name, one, other in pairs if one != other]
    return ", ".join(differing) or "its numerics have another fingerprint"
