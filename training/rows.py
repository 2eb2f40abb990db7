"""Rows of training tokens with their masks, and what every maker of rows does alike. Owns the arrays, the
background and the choice of targets; knows no fact and no model. NumPy only, fast enough for a dozen worker
processes to feed one GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mnemosyne.training.corpus import Stream
from mnemosyne.training.facts import PROMPT


@dataclass(frozen=True)
class Batch:
    """All arrays are [B, T]; a mask at t speaks of token t itself, not of the one predicted from it."""

    tokens: NDArray[np.int32]
    answer: NDArray[np.bool_]
    """The token is an answer, to be known from a fact."""
    text: NDArray[np.bool_]
    """The token is to be predicted as running text: all but facts and answers."""
    fact: NDArray[np.uint8]
    """Where the memory should write: 2 at a fact's value, 1 elsewhere in its sentence, 0 outside."""
    distance: NDArray[np.int32]
    """At an answer: how many tokens ago its fact's sentence ended; elsewhere 0."""
    task: NDArray[np.uint8]
    """At an answer: bAbI's number of the task that asks, 0 for an invented fact; elsewhere 0."""


@dataclass(frozen=True)
class Targets:
    """Where to compute logits, the same number for every row. ``at`` [B, K] is the token BEFORE the
    target."""

    at: NDArray[np.int64]
    target: NDArray[np.int64]
    answer: NDArray[np.float32]
    """[B, K], 1 where the target is an answer."""
    text: NDArray[np.float32]
    """[B, K], 1 where the target is running text."""
    distance: NDArray[np.int32]
    task: NDArray[np.uint8]


class Rows(ABC):
    """Makes rows; one per worker process, each with its own seed. ``streams`` are (source, share) pairs."""

    def __init__(self, tokenizer: Tokenizer, streams: Sequence[tuple[Stream, float]], seed: int) -> None:
        self._tokenizer = tokenizer
        self._streams = [stream for stream, _ in streams]
        self._shares = np.cumsum([share for _, share in streams])
        self.rng = np.random.default_rng(seed)
        self.stop = self.ids("." + str(PROMPT["end_of_turn"]))
        """What follows an answer."""

    @abstractmethod
    def row(self, out: Batch, row: int, length: int, noise: float) -> None:
        """Fill one row of a batch whose ``text`` is all true and whose other masks are all zero."""

    def batch(self, rows: int, length: int, noise: float) -> Batch:
        shape = (rows, length)
        out = Batch(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.bool_),
            np.ones(shape, np.bool_),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.uint8),
        )
        for row in range(rows):
            self.row(out, row, length, noise)
        return out

    def targets(self, batch: Batch, answers: int, text: int) -> Targets:
        """The first ``answers`` answers of each row and ``text`` running-text targets drawn at random."""
        rows, length = batch.tokens.shape
        at = np.zeros((rows, answers + text), np.int64)
        weight = np.zeros(at.shape, np.float32)
        for row in range(rows):
            found = np.flatnonzero(batch.answer[row])[:answers]
            at[row, : len(found)] = found - 1
            weight[row, : len(found)] = 1.0
        at[:, answers:] = self.rng.integers(0, length - 1, (rows, text))
        target = np.take_along_axis(batch.tokens, at + 1, 1).astype(np.int64)
        running = np.take_along_axis(batch.text, at + 1, 1).astype(np.float32)
        running[:, :answers] = 0.0
        distance = np.take_along_axis(batch.distance, at + 1, 1)
        return Targets(at, target, weight, running, distance, np.take_along_axis(batch.task, at + 1, 1))

    def background(self, length: int) -> NDArray[np.int32]:
        """Running text alone, `[length]`."""
        stream = self.source()
        start = self.jump(stream, length)
        return stream.tokens[start : start + length].astype(np.int32)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def source(self) -> Stream:
        """One of the streams, by their shares."""
        return self._streams[
            int(np.searchsorted(self._shares, self.rng.random() * self._shares[-1], "right"))
        ]

    def jump(self, stream: Stream, length: int) -> int:
        """A sentence end with at least ``length`` tokens after it."""
        last = stream.ended(len(stream.tokens) - length - 1)
        if last == 0:
            raise ValueError(
                f"the background text has {len(stream.tokens)} tokens, too few for rows of {length}"
            )
        return int(stream.ends[int(self.rng.integers(last))])

    @staticmethod
    def put(tokens: NDArray[np.int32], at: int, piece: list[int]) -> int:
        end = min(at + len(piece), len(tokens))
        tokens[at:end] = piece[: end - at]
        return end
