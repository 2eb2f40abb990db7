"""Several engines as one: who computes what, and when a state moves. Knows no process and no device.

A request goes where its base is; one on ``INITIAL`` goes where least is to do. At the beginning of a longer
request the base moves, by Export and Load, where its engine has had much more to do than another for a
while, or refuses the request because it is full. All engines hold the same weights and compute alike, so a
state goes on to the same bits wherever it is. An engine that dies takes only the states that it held.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Set
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from mnemosyne.engine.errors import CapacityError, ConfigError, EngineUnavailable, MnemosyneError
from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.member import ANSWERING, READING, Member, difference_between
from mnemosyne.engine.messages import (
    INITIAL,
    Advanced,
    EngineInfo,
    Finished,
    Loaded,
    Progress,
    Sampling,
    Token,
)
from mnemosyne.engine.moves import Moves
from mnemosyne.engine.places import Place, Places
from mnemosyne.engine.pyramid import Pyramid, Values

Event = TypeVar("Event")
OnProgress = Callable[[Progress], None]
MUCH = 0.75
"""By how much more load a state moves: about one reader more, besides the one that would go."""
MOVABLE_TOKENS = 256
"""An advance over fewer ends before a move would."""
STATS_SECONDS = 1.5
"""How long an engine may take to say its numbers; it answers between two steps."""


class Fleet:
    """Satisfies ``interface.EngineLike``."""

    def __init__(
        self, engines: Mapping[str, EngineLike], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``engines`` by the name of their device; none has started. ``clock`` gives seconds."""
        self._clock = clock
        self._members = [Member(name, engine, clock) for name, engine in engines.items()]
        self._places = Places()
        self._hooks: list[Callable[[], None]] = []
        self._info: EngineInfo | None = None
        self._moves = Moves(self._places, clock)
        for member in self._members:
            member.engine.on_lost(partial(self._lost, member))

    @property
    def engines(self) -> dict[str, EngineLike]:
        """By the name of their device; what is asked of one directly, the fleet doesn't know of."""
        return {member.name: member.engine for member in self._members}

    @property
    def info(self) -> EngineInfo:
        """What the engines have in common; ``device`` names them all, ``room_bytes`` is of all together."""
        if self._info is None:
            raise EngineUnavailable("the engines aren't ready")
        return self._info

    @property
    def ready(self) -> bool:
        """Whether there is one at least."""
        return any(member.usable for member in self._members)

    @property
    def incarnation(self) -> int:
        if self._info is None:
            return 0
        return 1 + sum(max(0, member.engine.incarnation - 1) for member in self._members)

    def on_lost(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    def holds(self, handle: str) -> bool:
        return self._places.holds(handle)

    def device_of(self, handle: str) -> str | None:
        """Where the state is, None for ``INITIAL`` and while that isn't known. Raises UnknownHandle."""
        place = self._places.find(handle)
        return place.member.name if place is not None and place.member is not None else None

    async def start(self) -> None:
        """Return when all are ready. Raises what one couldn't be started for, and ConfigError where they
        differ in their weights or in how they compute; none runs then."""
        starts = [member.engine.start() for member in self._members]
        results = await asyncio.gather(*starts, return_exceptions=True)
        try:
            for member, result in zip(self._members, results, strict=True):
                if isinstance(result, MnemosyneError):
                    raise type(result)(f"{member.name}: {result.message}", **result.attributes)
                if isinstance(result, BaseException):
                    raise result
            self._agree()
        except BaseException:
            await self.close()
            raise

    def _agree(self) -> None:
        first = self._members[0]
        for member in self._members:
            difference = difference_between(member.engine.info, first.engine.info)
            if difference is not None:
                raise ConfigError(
                    f"one server's devices must compute alike, and {member.name} differs from {first.name}:"
                    f" {difference}"
                )
            member.must_be_like(first.engine.info)
        rooms = [room for m in self._members if (room := m.engine.info.room_bytes) is not None]
        self._info = replace(
            first.engine.info,
            device=",".join(member.name for member in self._members),
            room_bytes=sum(rooms) if rooms else None,
        )
        self._moves.expect(self._info.state_bytes)

    async def close(self) -> None:
        await asyncio.gather(*(member.engine.close() for member in self._members))
        await self._moves.settle()

    async def advance(
        self,
        base: str,
        result: str,
        tokens: tuple[int, ...],
        kinds: bytes | None = None,
        tenant: str = "",
        on_progress: OnProgress | None = None,
    ) -> Advanced:
        def begin(engine: EngineLike, told: OnProgress) -> AsyncGenerator[Advanced, None]:
            return _once(engine.advance(base, result, tokens, kinds, tenant, told))

        return await _only(self._events(base, result, begin, on_progress, len(tokens) >= MOVABLE_TOKENS))

    async def generate(
        self,
        base: str,
        result: str | None,
        prompt: tuple[int, ...],
        sampling: Sampling,
        tenant: str = "",
        on_progress: OnProgress | None = None,
    ) -> AsyncGenerator[Token | Finished, None]:
        def begin(engine: EngineLike, told: OnProgress) -> AsyncGenerator[Token | Finished, None]:
            return engine.generate(base, result, prompt, sampling, tenant, told)

        async with aclosing(self._events(base, result, begin, on_progress, True)) as events:
            async for event in events:
                yield event

    async def export(self, handle: str) -> bytes:
        return await _only(self._events(handle, None, lambda engine, _: _once(engine.export(handle))))

    async def load(self, handle: str, data: bytes) -> Loaded:
        return await _only(self._events(INITIAL, handle, lambda engine, _: _once(engine.load(handle, data))))

    async def trace(self, handle: str) -> Pyramid:
        return await _only(self._events(handle, None, lambda engine, _: _once(engine.trace(handle))))

    async def trace_tokens(self, base: str, tokens: tuple[int, ...], tenant: str = "") -> Values:
        def begin(engine: EngineLike, _: OnProgress) -> AsyncGenerator[Values, None]:
            return _once(engine.trace_tokens(base, tokens, tenant))

        return await _only(self._events(base, None, begin))

    def release(self, handle: str) -> None:
        self._places.release(handle)

    async def stats(self) -> dict[str, float]:
        usable = [member for member in self._members if member.usable]
        if not usable:
            raise EngineUnavailable("no engine is running")
        total: dict[str, float] = {}
        for numbers in await asyncio.gather(*(member.engine.stats() for member in usable)):
            for name, value in numbers.items():
                total[name] = total.get(name, 0.0) + value
        return total

    async def device_stats(self) -> dict[str, dict[str, float]]:
        async def of(member: Member) -> dict[str, float]:
            # Known without its answer.
            restarts = max(0.0, member.engine.incarnation - 1.0)
            numbers = {"up": float(member.usable), "restarts_total": restarts}
            try:
                async with asyncio.timeout(STATS_SECONDS):
                    [said] = (await member.engine.device_stats()).values()
            except (MnemosyneError, TimeoutError):
                said = {}
            return said | numbers | member.stats()

        numbers = await asyncio.gather(*map(of, self._members))
        return {member.name: said for member, said in zip(self._members, numbers, strict=True)}

    async def _events(
        self,
        base: str,
        result: str | None,
        begin: Callable[[EngineLike, OnProgress], AsyncGenerator[Event, None]],
        on_progress: OnProgress | None = None,
        movable: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """What ``begin`` yields at the member that has, or is given, the base; sent at once where nothing has
        to move first. A member that is full refuses before it begins, and then the next one is asked."""
        begun = False

        def told(progress: Progress) -> None:
            nonlocal begun
            begun = True
            if on_progress is not None:
                on_progress(progress)

        with ExitStack() as stack:
            place = self._places.find(base)
            if place is not None:
                stack.enter_context(self._places.pinned(place))
            made = stack.enter_context(self._places.making(result)) if result is not None else None
            tried: set[Member] = set()
            refusal: CapacityError | None = None
            while True:
                here = await place.known() if place is not None else None
                member = self._choose(place, here, movable, tried)
                if member is None:
                    raise refusal or EngineUnavailable("no engine is running")
                with member.share() as share:
                    if place is not None and member is not here:
                        await self._moves.move(place, member)
                        if place.member is not member:
                            movable = False
                            tried.add(member)
                            continue
                    if place is not None and not place.bound:
                        share.weigh(0.0)
                        place.when_bound.append(partial(share.weigh, READING))
                    if made is not None:
                        made.put(member, place.since if place is not None else self._clock())
                    try:
                        async with aclosing(begin(member.engine, told)) as events:
                            async for event in events:
                                begun = True
                                if isinstance(event, Token):
                                    share.weigh(ANSWERING)
                                elif made is not None:
                                    made.bind()
                                yield event
                        return
                    except CapacityError as error:
                        if begun:
                            raise
                        refusal = error
                        tried.add(member)
                        if made is not None:
                            made.take_back()

    def _choose(
        self, place: Place | None, here: Member | None, movable: bool, tried: Set[Member]
    ) -> Member | None:
        """Who computes next on the base at ``place``, which is at ``here`` (both None: anywhere), of those
        that weren't ``tried``; None where nobody is left."""
        others = [member for member in self._members if member.usable and member not in tried | {here}]
        best = min(others, key=lambda m: (round(m.expected, 1), self._places.count(m)), default=None)
        if place is None or here is None or here in tried:
            return best
        if best is None or not (movable and self._moves.due(place)):
            return here
        own = 0.0 if place.bound else READING
        return best if here.others(own) - best.expected >= MUCH else here

    def _lost(self, member: Member) -> None:
        self._places.lose(member)
        for hook in self._hooks:
            hook()


async def _once(answer: Awaitable[Event]) -> AsyncGenerator[Event, None]:
    yield await answer


async def _only(events: AsyncGenerator[Event, None]) -> Event:
    async with aclosing(events):
        return await anext(events)
