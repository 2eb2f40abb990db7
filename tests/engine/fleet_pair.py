"""Two engines behind one fleet, for tests: who is busy, what time it is, what one alone would have made."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from mnemosyne.engine.fleet import MOVABLE_TOKENS, Fleet
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.messages import INITIAL, Finished, Sampling
from tests.engine.fakes import FakeModel, fake_engine

LONG = tuple(i * 7 % 39 for i in range(MOVABLE_TOKENS))
SHORT = LONG[: MOVABLE_TOKENS - 1]


@dataclass
class Pair:
    """Two engines in threads, whose models can be held up, behind one fleet with a clock of its own."""

    limits: dict[str, float]
    models: dict[str, FakeModel] = field(default_factory=dict)
    engines: dict[str, InlineEngine] = field(default_factory=dict)
    seconds: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            self.models[name] = FakeModel()
            self.engines[name] = InlineEngine(fake_engine(self.models[name], **self.limits))
        self.fleet = Fleet(self.engines, lambda: self.seconds)

    async def session(self, handle: str, device: str) -> None:
        """A state on ``device``; with nothing to do anywhere, the engine with fewest states has the next."""
        for ballast in (f"{handle} {i}" for i in range(10)):
            self.later()
            await self.fleet.advance(INITIAL, ballast, LONG)
            if self.fleet.device_of(ballast) == device:
                break
        self.fleet.release(ballast)
        self.later()
        await self.fleet.advance(INITIAL, handle, LONG)
        assert self.fleet.device_of(handle) == device
        for i in range(10):
            self.fleet.release(f"{handle} {i}")

    def readers(self, device: str, base: str, count: int) -> list[asyncio.Task[object]]:
        """Requests on ``device`` that go on until its gate opens."""
        self.models[device].gate.clear()
        return [
            asyncio.create_task(self.fleet.advance(base, f"{base} read {i}", SHORT)) for i in range(count)
        ]

    async def crowded(self, base: str, device: str) -> list[asyncio.Task[object]]:
        """``base`` is on ``device``, which has had two readers for a minute, and has them until its gate
        opens."""
        await self.session(base, device)
        readers = self.readers(device, base, 2)
        await asyncio.sleep(0)
        self.later()
        return readers

    def load(self, device: str) -> float:
        [member] = [member for member in self.fleet._members if member.name == device]
        return member.expected

    def later(self, seconds: float = 60.0) -> None:
        self.seconds += seconds

    def open(self) -> None:
        for model in self.models.values():
            model.gate.set()


async def alone(*parts: tuple[int, ...]) -> bytes:
    """The state that one engine makes of them."""
    engine = InlineEngine(fake_engine())
    await engine.start()
    base = INITIAL
    for i, part in enumerate(parts):
        await engine.advance(base, f"{i}", part)
        base = f"{i}"
    state = await engine.export(base)
    await engine.close()
    return state


async def answer(fleet: Fleet, base: str, result: str | None = None, max_tokens: int = 20) -> tuple[int, ...]:
    async for event in fleet.generate(base, result, (1, 2), Sampling(max_tokens=max_tokens, seed=4)):
        if isinstance(event, Finished):
            return event.tokens
    raise AssertionError
