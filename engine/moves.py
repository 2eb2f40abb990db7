"""Bringing a state from one member of a fleet to another. Owns the order in which nothing is lost, and how
long it takes; doesn't decide what moves where.

The state stays bound where it was until it is bound at its new place, and then its handle means the new one.
If its old engine dies in between, the bytes underway are it; if the new one dies or refuses it, it stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mnemosyne.engine.errors import EngineUnavailable, MnemosyneError
from mnemosyne.engine.member import Member
from mnemosyne.engine.places import Place, Places

log = logging.getLogger(__name__)
FIRST_GUESS = 2e8
"""Bytes a second, until a move was measured."""
LEAST_SECONDS = 0.01
PATIENCE = 10.0
"""A state stays for as many times as long as a move takes: moving takes a tenth of its time at most."""
_WEIGHT = 0.3


class Moves:
    def __init__(self, places: Places, clock: Callable[[], float]) -> None:
        """``clock`` gives seconds."""
        self._places, self._clock = places, clock
        self._seconds = 0.0
        self._running: set[asyncio.Task[None]] = set()

    def expect(self, state_bytes: int) -> None:
        """Guess what a move takes, from the size of what moves."""
        self._seconds = LEAST_SECONDS + state_bytes / FIRST_GUESS

    def due(self, place: Place) -> bool:
        """Whether the state has been where it is for long enough to move for balance's sake."""
        return self._clock() - place.since >= PATIENCE * self._seconds

    async def move(self, place: Place, to: Member) -> None:
        """Bring the state to ``to``, once it is made; where that fails it stays. One that moves already: wait
        for that."""
        if place.moving is None:
            place.moving = asyncio.create_task(self._carry(place, to), name="move")
            self._running.add(place.moving)
            place.moving.add_done_callback(self._running.discard)
        # Shielded: others may wait for the same move when this caller leaves.
        await asyncio.shield(place.moving)

    async def settle(self) -> None:
        """Return when none is under way."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _carry(self, place: Place, to: Member) -> None:
        source = place.member
        assert source is not None
        with self._places.pinned(place):
            await place.ended.wait()
            if place.error is not None:
                return
            began = self._clock()
            try:
                data = await source.engine.export(place.handle)
                place.carried = True
                await to.engine.load(place.handle, data)
                if not to.engine.holds(place.handle):
                    raise EngineUnavailable("its engine ended")
            except MnemosyneError as error:
                source.moves_failed += 1
                log.warning(
                    "a state stays on %s, %s doesn't take it: %s", source.name, to.name, error.message
                )
                if not source.engine.holds(place.handle):
                    self._places.drop(place, error)
                return
            finally:
                place.carried, place.moving = False, None
            place.put(to, self._clock())
            source.engine.release(place.handle)
        seconds = self._clock() - began
        self._seconds += _WEIGHT * (seconds - self._seconds)
        source.moved_out += 1
        to.moved_in += 1
        log.info("a state moved from %s to %s in %.3f s", source.name, to.name, seconds)
