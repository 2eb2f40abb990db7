"""States that the engine holds for sessions, by what they are the state of. Owns handles, pins and who goes
first.

Knows no journal and no store: what is to be saved before it goes is given to a hook.
"""

from __future__ import annotations

import itertools
import secrets
import time
from dataclasses import dataclass, field

from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import INITIAL
from mnemosyne.server.sessions.records import Point


@dataclass(eq=False)
class Resident:
    """A state bound in the engine. Held while it is pinned, and while a session claims it as one it may go on
    from."""

    point: Point
    """Canonical (``lineage.canonical``): forks and rewinds share it."""
    home: Point
    """The commit under which a snapshot of it is stored."""
    handle: str
    saved: int
    """Tokens at the newest snapshot on its way."""
    pins: int = 0
    claims: set[str] = field(default_factory=set)
    """Sessions that may go on from it; a fork shares its parent's."""
    used: float = field(default_factory=time.monotonic)

    @property
    def replay(self) -> int:
        """Tokens that a restore would have to replay now."""
        return self.point.tokens - self.saved


class Residents:
    def __init__(self, engine: EngineLike, capacity: int) -> None:
        """``capacity``: states to hold before unpinned ones must go."""
        self._engine, self.capacity = engine, capacity
        self._by_point: dict[Point, Resident] = {}
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._by_point)

    def new_handle(self) -> str:
        return f"{self._prefix}-{next(self._numbers)}"

    def find(self, point: Point) -> Resident | None:
        return self._by_point.get(point)

    def all(self) -> list[Resident]:
        return list(self._by_point.values())

    def adopt(self, resident: Resident) -> Resident:
        """Hold a newly bound state. Where its point is held already, that one is and this handle goes; one
        that its engine took along meanwhile isn't held."""
        if resident.handle == INITIAL or not self._engine.holds(resident.handle):
            return resident
        held = self._by_point.setdefault(resident.point, resident)
        if held is not resident:
            self._engine.release(resident.handle)
            held.claims |= resident.claims
        return held

    def pin(self, resident: Resident) -> None:
        resident.pins += 1
        resident.used = time.monotonic()

    def unpin(self, resident: Resident) -> None:
        resident.pins -= 1
        resident.used = time.monotonic()
        self._drop_unless_needed(resident)

    def disclaim(self, resident: Resident, session_id: str) -> None:
        """The session has moved on: the state goes once nobody uses or claims it."""
        resident.claims.discard(session_id)
        self._drop_unless_needed(resident)

    def drop(self, resident: Resident) -> None:
        """Forget it now; requests that use it go on."""
        if self._by_point.get(resident.point) is resident:
            del self._by_point[resident.point]
            self._engine.release(resident.handle)

    def forget_lost(self) -> None:
        """An engine is gone: forget the states that it held."""
        self._by_point = {point: r for point, r in self._by_point.items() if self._engine.holds(r.handle)}

    def surplus(self) -> list[Resident]:
        """Those to let go to come back to the capacity, the least recently used first; pinned ones can't
        be."""
        free = sorted((r for r in self._by_point.values() if not r.pins), key=lambda r: r.used)
        return free[: max(0, len(self._by_point) - self.capacity)]

    def _drop_unless_needed(self, resident: Resident) -> None:
        if not resident.pins and not resident.claims:
            self.drop(resident)
