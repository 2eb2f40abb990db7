"""Samples: a task's facts spread in order through background sentences, the question after them. Owns the
construction; knows no server.

As BABILong does it (``NoiseInjectionDataset``): the facts and the background together have the asked number
of tokens, every fact gets a place between two background sentences, all places equally likely, and facts keep
their order. A sample is a function of the seed, the files, the task, the length and its number; its text is
read out of views on the books and is never put together in memory.
"""

from __future__ import annotations

import bisect
import io
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training.babilong.haystack import Haystack
from mnemosyne.training.babilong.tasks import Question, Task

SAMPLES = ((128_000, 100), (1_000_000, 50))
"""(longest length, samples)."""
FEWEST = 20
"""Samples of a length beyond them."""
Piece = bytes | memoryview
Key = tuple[str, int, int]
"""Task, length in tokens, number of the sample."""


@dataclass(frozen=True)
class Sample:
    key: Key
    pieces: tuple[Piece, ...]
    """The text, in order."""
    question: str
    answer: str
    labels: frozenset[str]
    """All answers of the task."""
    tokens: int
    """Of the text: facts and background. At most the length, short of it by less than a word."""
    repeats: float
    """Background tokens over those of the books: above 1 the model reads some text more than once."""
    depths: tuple[float, ...]
    """Share of the tokens before each fact that the answer rests on, rising."""

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.pieces))

    def open(self) -> io.BufferedReader:
        """The text as a file of UTF-8; seekable, so that an upload can go on where it broke."""
        return io.BufferedReader(_Pieces(self.pieces))


class _Pieces(io.RawIOBase):
    """Bytes in pieces as one file."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = [memoryview(piece) for piece in pieces]
        self._ends = list(itertools.accumulate(map(len, self._pieces)))
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._ends[-1]}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        """From one piece alone, so perhaps less than there is room for; 0 at the end."""
        i = bisect.bisect_right(self._ends, self._place)
        if i == len(self._pieces):
            return 0
        piece = self._pieces[i]
        data = piece[self._place - self._ends[i] + len(piece) :][: len(buffer)]
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class Maker:
    """Makes samples; any number of threads at once."""

    def __init__(self, haystack: Haystack, tokenizer: Tokenizer, seed: int) -> None:
        self.haystack, self.seed = haystack, seed
        self._tokenizer = tokenizer
        self._counted: dict[str, int] = {}

    def count(self, text: str) -> int:
        """Tokens of a text that stands after a space."""
        if text not in self._counted:
            self._counted[text] = len(self._tokenizer.encode(f" {text}", add_special_tokens=False).ids)
        return self._counted[text]

    def fact_tokens(self, question: Question) -> int:
        return sum(map(self.count, question.facts))

    def chosen(self, task: Task, length: int, count: int) -> list[Question]:
        """``count`` different questions whose facts fit into ``length`` tokens, drawn by the seed: the same
        ones at every length that they fit into.

        Raises ConfigError where there are fewer.
        """
        order = random.Random(f"{self.seed} {task.name}").sample(task.questions, len(task.questions))
        fitting = (question for question in order if self.fact_tokens(question) <= length)
        questions = list(itertools.islice(fitting, count))
        if not questions:
            least = min(map(self.fact_tokens, order))
            raise ConfigError(
                f"{task.name} can't be asked at {length} tokens: the facts of its shortest question have "
                f"{least}"
            )
        if len(questions) < count:
            raise ConfigError(
                f"{task.file} has {len(questions)} questions whose facts fit into {length} tokens, and "
                f"{count} samples were asked for: give more questions, a greater length or --samples "
                f"{len(questions)}"
            )
        return questions

    def make(self, task: Task, length: int, index: int, question: Question) -> Sample:
        """Sample ``index`` of a task and length. The question's facts must fit."""
        rng = random.Random(f"{self.seed} {task.name} {length} {index}")
        hay = self.haystack
        room = length - self.fact_tokens(question)
        first = rng.randrange(hay.sentences)
        end = hay.reach(first, room)
        rest, rest_tokens = self._head(end, room - (hay.at(end) - hay.at(first)))
        last = end + bool(rest)
        places = sorted(rng.randrange(first, last + 1) for _ in question.facts)
        pieces: list[Piece] = []
        before: list[int] = []
        told, at = 0, first
        for fact, place in zip(question.facts, places, strict=True):
            pieces += _background(hay, at, place, end, rest)
            background = hay.at(min(place, end)) - hay.at(first) + (rest_tokens if place > end else 0)
            before.append(background + told)
            pieces.append(f" {fact}".encode())
            told += self.count(fact)
            at = place
        pieces += _background(hay, at, last, end, rest)
        tokens = hay.at(end) - hay.at(first) + rest_tokens + told
        return Sample(
            key=(task.name, length, index),
            pieces=tuple(pieces),
            question=question.question,
            answer=question.answer,
            labels=task.answers,
            tokens=tokens,
            repeats=(tokens - told) / hay.tokens,
            depths=tuple(before[i] / tokens for i in question.supporting),
        )

    def _head(self, sentence: int, room: int) -> tuple[bytes, int]:
        """The first words of a sentence that fit into ``room`` tokens, and their tokens."""
        text = b"".join(self.haystack.views(sentence, sentence + 1)).decode()
        words, taken, kept = text[1:].split(" "), 0, text[:1]
        for word in words:
            cost = self.count(word) if kept != "\n" else self._first(kept + word)
            if taken + cost > room:
                break
            kept += word if kept in (" ", "\n") else f" {word}"
            taken += cost
        return (kept.encode(), taken) if taken else (b"", 0)

    def _first(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _background(hay: Haystack, first: int, last: int, end: int, rest: bytes) -> Iterator[Piece]:
    """Sentences ``first`` to before ``last``, of which number ``end`` is ``rest``."""
    yield from hay.views(first, min(last, end))
    if first <= end < last:
        yield rest


@dataclass(frozen=True)
class Asked:
    """A sample before it is made."""

    task: Task
    length: int
    index: int
    question: Question

    @property
    def key(self) -> Key:
        return self.task.name, self.length, self.index


def samples_at(length: int) -> int:
    """How many samples a length gets, unless something else is asked for."""
    return next((count for most, count in SAMPLES if length <= most), FEWEST)


def plan(
    maker: Maker, tasks: Sequence[Task], lengths: Sequence[int], samples: Mapping[int, int]
) -> list[Asked]:
    """Every sample to ask, short lengths first; ``samples`` has how many a length gets.

    Raises ConfigError as ``Maker.chosen`` does.
    """
    return [
        Asked(task, length, index, question)
        for length in sorted(lengths)
        for task in tasks
        for index, question in enumerate(maker.chosen(task, length, samples[length]))
    ]
