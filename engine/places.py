"""Which member of a fleet holds which handle. Owns the names; decides nothing, sends nothing but releases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mnemosyne.engine.errors import EngineError, EngineUnavailable, MnemosyneError, UnknownHandle
from mnemosyne.engine.member import Member
from mnemosyne.engine.messages import INITIAL


@dataclass(eq=False)
class Place:
    """Where one state is. Outlives its handle's release while requests refer to it."""

    handle: str
    member: Member | None = None
    """None until the request that makes the state is about to be sent."""
    since: float = 0.0
    """When this state, or one that it came from, was placed there."""
    bound: bool = False
    """The state is there; until then the request that makes it runs."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it is bound, or ``error`` is known."""
    when_bound: list[Callable[[], None]] = field(default_factory=list)
    carried: bool = False
    """Its bytes are here, on their way to another member: it doesn't go with the one that holds it."""
    moving: asyncio.Task[None] | None = None
    pins: int = 0
    released: bool = False
    error: MnemosyneError | None = None
    """Why there won't be such a state."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once ``member`` or ``error`` is known."""

    def put(self, member: Member, since: float) -> None:
        self.member, self.since = member, since
        self.settled.set()

    def bind(self) -> None:
        self.bound = True
        self.ended.set()
        for call in self.when_bound:
            call()
        self.when_bound.clear()

    def take_back(self) -> None:
        """It won't be there after all."""
        self.member = None
        self.settled.clear()

    async def known(self) -> Member:
        """The member, as soon as it is known. Raises ``error``."""
        while self.member is None and self.error is None:
            await self.settled.wait()
        if self.error is not None:
            raise self.error
        assert self.member is not None
        return self.member


class Places:
    def __init__(self) -> None:
        self._by_handle: dict[str, Place] = {}

    def holds(self, handle: str) -> bool:
        return handle == INITIAL or handle in self._by_handle

    def count(self, member: Member) -> int:
        """Handles that it holds."""
        return sum(place.member is member for place in self._by_handle.values())

    def find(self, handle: str) -> Place | None:
        """None for ``INITIAL``, which every member holds. Raises UnknownHandle."""
        if handle == INITIAL:
            return None
        place = self._by_handle.get(handle)
        if place is None:
            raise UnknownHandle(f"no state {handle!r} is held by any engine", handle=handle)
        return place

    @contextmanager
    def pinned(self, place: Place) -> Iterator[None]:
        """While inside, the state stays though its handle be released."""
        place.pins += 1
        try:
            yield
        finally:
            place.pins -= 1
            self._let_go(place)

    @contextmanager
    def making(self, handle: str) -> Iterator[Place]:
        """The place of a state that is being made; left with ``bound`` unset, there is none. Raises
        EngineError if ``handle`` is in use."""
        if self.holds(handle):
            raise EngineError(f"handle {handle!r} is bound already; a result needs a new one")
        place = self._by_handle[handle] = Place(handle)
        with self.pinned(place):
            try:
                yield place
            except MnemosyneError as error:
                self.drop(place, error)
                raise
            finally:
                if not place.bound:
                    self.drop(place, UnknownHandle(f"the state {handle!r} wasn't made", handle=handle))
                    # Left early, its request was cancelled, and may have been done by then.
                    place.released = True

    def release(self, handle: str) -> None:
        place = self._by_handle.pop(handle, None)
        if place is not None:
            place.released = True
            self._let_go(place)

    def drop(self, place: Place, error: MnemosyneError) -> None:
        """There is no such state, or no longer; whoever waits for it fails with ``error``."""
        if self._by_handle.get(place.handle) is place:
            del self._by_handle[place.handle]
        if place.error is None:
            place.error = error
        place.settled.set()
        place.ended.set()

    def lose(self, member: Member) -> None:
        """The member's engine is gone: drop what it held, but what is on its way to another."""
        for place in [p for p in self._by_handle.values() if p.member is member and not p.carried]:
            self.drop(place, EngineUnavailable(f"the engine on {member.name} ended, and its states with it"))

    def _let_go(self, place: Place) -> None:
        if place.released and not place.pins and place.member is not None:
            place.member.engine.release(place.handle)
