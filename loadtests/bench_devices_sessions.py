"""Sessions of the bench of several devices: what they read and answer, and how fast all of them are together.
Knows no device and no table."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import INITIAL, Finished, Sampling, Token

AHEAD = 2
"""Pieces of one session that are under way at a time, as documents have them."""
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    vocab: int
    sessions: int
    tokens: int
    """That each session reads, in requests of ``piece``."""
    piece: int
    answer: int
    """Tokens that each emits."""
    checked: int
    """Sessions whose states are compared."""

    @property
    def most_queued(self) -> int:
        """Tokens that may be queued at once, with room for what is sent to a device before it is moved on."""
        return 2 * self.sessions * (AHEAD * self.piece + PROMPT_TOKENS)


class Session:
    def __init__(self, name: str, plan: Plan, seed: int) -> None:
        self.name, self.seed = name, seed
        generator = torch.Generator().manual_seed(seed)
        self.ids: tuple[int, ...] = tuple(
            torch.randint(plan.vocab, (plan.tokens,), generator=generator).tolist()
        )
        self.handle = INITIAL
        self.answer: tuple[int, ...] = ()

    async def digest(self, engine: EngineLike) -> str:
        """Of the state's bytes: equal states, equal bytes."""
        return hashlib.sha256(await engine.export(self.handle)).hexdigest()


async def ingest(
    engine: EngineLike, sessions: Sequence[Session], plan: Plan, tokens: int | None = None
) -> float:
    """All sessions read ``tokens`` of theirs (None: all) from the beginning; tokens a second of all together,
    from the first request to the last answer."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one(session: Session) -> int:
        ids = session.ids[:tokens]
        session.handle = await read(engine, session, ids, INITIAL, plan.piece)
        return len(ids)

    read_tokens = sum(await asyncio.gather(*map(one, sessions)))
    return read_tokens / (loop.time() - began)


async def read(engine: EngineLike, session: Session, ids: Sequence[int], base: str, piece: int) -> str:
    """The handle of ``base`` and ``ids``; the handles on the way are released, ``base`` too."""
    sent: deque[tuple[asyncio.Task[object], str]] = deque()
    for start in range(0, len(ids), piece):
        result = f"{session.name} {session.seed} after {base} {start}"
        part = tuple(ids[start : start + piece])
        task = asyncio.create_task(engine.advance(base, result, part))
        sent.append((task, base))
        await asyncio.sleep(0)
        if len(sent) == AHEAD:
            await _ended(engine, *sent.popleft())
        base = result
    while sent:
        await _ended(engine, *sent.popleft())
    return base


async def _ended(engine: EngineLike, task: asyncio.Task[object], base: str) -> None:
    await task
    if base != INITIAL:
        engine.release(base)


async def decode(engine: EngineLike, sessions: Sequence[Session], plan: Plan) -> float:
    """All sessions answer at once; tokens a second of all together while all of them emit."""
    loop = asyncio.get_running_loop()

    async def one(session: Session) -> list[float]:
        prompt = session.ids[:PROMPT_TOKENS]
        sampling = Sampling(max_tokens=plan.answer, temperature=1.0, seed=session.seed, ignore_eos=True)
        times = []
        async for event in engine.generate(session.handle, None, prompt, sampling):
            if isinstance(event, Token):
                times.append(loop.time())
            elif isinstance(event, Finished):
                session.answer = event.tokens
        return times

    times = await asyncio.gather(*map(one, sessions))
    first, last = max(each[0] for each in times), min(each[-1] for each in times)
    inside = sum(first < at <= last for each in times for at in each)
    return inside / (last - first) if last > first else 0.0
