"""Worker processes that make rows while the GPU computes. Owns the processes and their queue; knows no model.

Workers follow the curriculum through two shared numbers, so a batch already queued may still be of the last
stage.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mnemosyne.training import corpus
from mnemosyne.training.babilong.stories import load_stories
from mnemosyne.training.babilong.story_rows import StoryRows
from mnemosyne.training.babilong.strays import lookalikes
from mnemosyne.training.corpus import Stream
from mnemosyne.training.mixed_rows import MixedRows
from mnemosyne.training.rows import Rows
from mnemosyne.training.samples import MAX_FACTS, Sampler
from mnemosyne.training.settings import Settings

SHARES = {"books": 0.4, "docs": 0.6}
LOOKALIKES = 0.25
"""Share of the stories' background that is sentences with their words."""


class Arrays(NamedTuple):
    """One batch as it travels: ``tokens`` and ``fact`` [B, T], the rest [B, K] (``rows.Targets``)."""

    tokens: NDArray[Any]
    fact: NDArray[Any]
    at: NDArray[Any]
    target: NDArray[Any]
    answer: NDArray[Any]
    text: NDArray[Any]
    distance: NDArray[Any]
    task: NDArray[Any]


class Before(NamedTuple):
    """What the sessions of a batch's rows read before it (``history``)."""

    tokens: NDArray[Any]
    """`[B, T]`, now; what came earlier is in their states."""
    restarts: NDArray[Any]
    """`[B]`: the session begins anew with it."""
    begins: NDArray[Any]
    """`[B]`: the row itself begins a session, and has no history."""


def draw(sampler: Rows, step_tokens: int, length: int, noise: float) -> Arrays:
    """A batch of about ``step_tokens`` tokens in rows of ``length``; its shapes depend on these two alone."""
    batch = sampler.batch(max(1, step_tokens // length), length, noise)
    chosen = sampler.targets(batch, answers=min(MAX_FACTS, length // 20), text=length // 8)
    return Arrays(batch.tokens.astype(np.uint16), batch.fact, *vars(chosen).values())


def draw_before(sampler: Rows, rows: int, length: int, share: float, tokens: int) -> Before:
    """For ``rows`` rows, a ``share`` of which has a history, of ``tokens`` tokens on average."""
    read = np.stack([sampler.background(length) for _ in range(rows)])
    restarts, begins = sampler.rng.random((2, rows))
    return Before(read.astype(np.uint16), restarts < length / tokens, begins >= share)


def tokenizer_of(settings: Settings) -> Tokenizer:
    """Raises ValueError where it isn't the one that the model is made for."""
    tokenizer = Tokenizer.from_file(str(settings.tokenizer))
    if tokenizer.get_vocab_size() != settings.vocabulary:
        raise ValueError(
            f"{settings.tokenizer} has {tokenizer.get_vocab_size()} tokens, and the model is to have "
            f"{settings.vocabulary} (--vocabulary)"
        )
    return tokenizer


def sampler(settings: Settings, seed: int) -> Rows:
    tokenizer = tokenizer_of(settings)
    streams = {name: corpus.load(settings.data, name) for name in SHARES}
    invented = Sampler(tokenizer, [(streams[name], share) for name, share in SHARES.items()], seed)
    if settings.babi is None:
        return invented
    stories = load_stories(settings.babi, settings.told, "train")
    told = StoryRows(tokenizer, read_past(streams["books"], invented.ids, settings), seed, stories)
    return MixedRows(tokenizer, [(told, 1 - settings.invented), (invented, settings.invented)], seed)


def read_past(
    books: Stream, ids: Callable[[str], list[int]], settings: Settings
) -> list[tuple[Stream, float]]:
    """What stories are hidden in: books, and more of their lookalikes than stand there, if they fill rows."""
    alike = lookalikes(books, ids)
    enough = len(alike.tokens) > 2 * max(length for length, _ in settings.stages)
    return [(books, 1 - LOOKALIKES), (alike, LOOKALIKES)] if enough else [(books, 1.0)]


def _work(
    settings: Settings, seed: int, noise: Synchronized[float], length: Synchronized[int], out: Any
) -> None:
    made = sampler(settings, seed)
    while True:
        batch = draw(made, settings.step_tokens, length.value, noise.value)
        before = None
        if settings.history:
            rows, size = batch.tokens.shape
            before = draw_before(made, rows, size, settings.history, settings.history_tokens)
        out.put((batch, before))


class Feed:
    """``with Feed(settings, noise, length) as feed: feed.get()``; ``steer`` moves the curriculum."""

    def __init__(self, settings: Settings, noise: float, length: int, round_: int) -> None:
        tokenizer_of(settings)  # what a worker raises nobody hears
        context = mp.get_context("spawn")
        self._noise = context.Value("d", noise)
        self._length = context.Value("i", length)
        self._queue = context.Queue(16)
        seeds = [settings.seed + 7919 * (i + 1) + 104_729 * round_ for i in range(settings.workers)]
        self._processes = [
            context.Process(
                target=_work, args=(settings, s, self._noise, self._length, self._queue), daemon=True
            )
            for s in seeds
        ]

    def __enter__(self) -> Feed:
        for process in self._processes:
            process.start()
        return self

    def steer(self, noise: float, length: int) -> None:
        self._noise.value = noise
        self._length.value = length

    def get(self) -> tuple[Arrays, Before | None]:
        batch: tuple[Arrays, Before | None] = self._queue.get(timeout=120)
        return batch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
