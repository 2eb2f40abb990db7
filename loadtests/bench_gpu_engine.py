"""The HTTP bench's requests made of the engine itself: what is left when the server is taken away. Knows no
HTTP and no table.

The engine is the process that a server starts, reached as the server reaches it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from contextlib import suppress

from bench_gpu_streams import Asked, Measured, Sample, sample

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import INITIAL, Progress, Sampling, Token

NAMES = itertools.count()
"""Of handles, which are bound once."""
PIECES = 8
AHEAD = 2
"""Requests of the reading session that are under way at once."""


class Reader:
    """A session that reads random tokens, piece after piece, until it is told to stop."""

    def __init__(self, engine: EngineLike, vocab: int, piece: int) -> None:
        self._engine = engine
        rng = random.Random(7)
        # Again and again the same few: to draw them takes about as long as a fast engine to read them.
        self._pieces = itertools.cycle([tuple(rng.choices(range(vocab), k=piece)) for _ in range(PIECES)])
        self.done = 0
        """Tokens that were committed."""

    async def read(self, tokens: float) -> None:
        """Read so many (it may be infinite) and forget it all. The next piece is there before the engine has
        read this one, as the server does it."""
        base, left = INITIAL, tokens
        under_way: list[asyncio.Task[None]] = []
        made: list[str] = []
        try:
            while left > 0 or under_way:
                while left > 0 and len(under_way) < AHEAD:
                    ids = next(self._pieces)
                    ids = ids if left >= len(ids) else ids[: int(left)]
                    made.append(f"reading-{next(NAMES)}")
                    under_way.append(asyncio.create_task(self._advance(base, made[-1], ids)))
                    base, left = made[-1], left - len(ids)
                    await asyncio.sleep(0)  # so that it is sent
                await under_way.pop(0)
                # Those under way have what they need of it.
                self._engine.release(made.pop(0))
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            for handle in made:
                self._engine.release(handle)

    async def _advance(self, base: str, result: str, ids: tuple[int, ...]) -> None:
        known = 0

        def told(progress: Progress) -> None:
            nonlocal known
            self.done += progress.tokens_done - known
            known = progress.tokens_done

        await self._engine.advance(base, result, ids, on_progress=told)


async def measure_engine(
    engine: EngineLike, asked: Asked, vocab: int, token: int, streams: int, beside: bool
) -> Measured:
    """``streams`` sessions with a context of their own, each asking round after round. ``token`` is what all
    answers consist of. Raises what the engine raises."""
    bases = [f"context-{streams}-{beside}-{i}" for i in range(streams)]
    rng = random.Random(streams)
    contexts = [tuple(rng.choices(range(vocab), k=asked.context)) for _ in bases]
    await asyncio.gather(
        *(engine.advance(INITIAL, base, ids) for base, ids in zip(bases, contexts, strict=True))
    )
    prompt = tuple(rng.choices(range(vocab), k=asked.prompt))
    await asyncio.gather(*(_ask(engine, base, prompt, asked.answer, token) for base in bases))
    reader = Reader(engine, vocab, asked.piece)
    reading = asyncio.create_task(reader.read(float("inf"))) if beside else None
    while reading is not None and not reader.done:
        if reading.done():
            await reading  # it failed before it had read anything
        await asyncio.sleep(0.01)
    before, began = reader.done, time.perf_counter()

    async def stream(base: str) -> list[Sample]:
        return [await _ask(engine, base, prompt, asked.answer, token) for _ in range(asked.rounds)]

    samples = await asyncio.gather(*(stream(base) for base in bases))
    speed = (reader.done - before) / (time.perf_counter() - began)
    if reading is not None:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
    for base in bases:
        engine.release(base)
    return Measured(streams, beside, list(itertools.chain(*samples)), speed)


async def _ask(engine: EngineLike, base: str, prompt: tuple[int, ...], count: int, token: int) -> Sample:
    sampling = Sampling(max_tokens=count, temperature=0.0, logit_bias={token: 100.0}, ignore_eos=True)
    began, arrivals = time.perf_counter(), []
    async for event in engine.generate(base, None, prompt, sampling):
        if isinstance(event, Token):
            arrivals.append(time.perf_counter())
    if len(arrivals) != count:
        raise MnemosyneError(f"the engine emitted {len(arrivals)} tokens instead of {count}")
    return sample(began, arrivals)
