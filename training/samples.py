"""Rows of training tokens: facts told among running text, and questions about them later. Owns what a row
looks like and its masks; knows no model. NumPy only, fast enough for a dozen worker processes to feed one
GPU.

``noise`` is the mean number of background tokens that come with each fact: the curriculum's one dial.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mnemosyne.training.corpus import Stream
from mnemosyne.training.facts import ADJECTIVES, NOUNS, PROMPT, QUESTION, RELATIONS, Relation, pairs

MAX_FACTS = 48
_FACT_TOKENS, _QUESTION_TOKENS = 14, 13
_UPDATE = 0.05
_DISTRACTOR = 0.15
_DISTRACTORS = (
    "The {entity} was not there.",
    "Nobody had seen the {entity} that day.",
    "They spoke of {value} all evening.",
    "Some say {value}, but nobody knows.",
    "The {entity} and the {other} went home.",
    "It was a {adjective} day and the {noun} was nowhere to be seen.",
)


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


_Piece = list[int | str]


@dataclass
class _Told:
    """A fact inside one row: its latest value and where that was told."""

    entity: str
    relation: Relation
    value: str = ""
    end: int = 0


class Sampler:
    """Makes rows. One per worker process, each with its own seed; ``streams`` are (source, share) pairs."""

    def __init__(self, tokenizer: Tokenizer, streams: Sequence[tuple[Stream, float]], seed: int) -> None:
        self._tokenizer = tokenizer
        self._streams = [stream for stream, _ in streams]
        self._shares = np.cumsum([share for _, share in streams])
        self._rng = np.random.default_rng(seed)
        self._pairs = pairs("train")
        self._by_relation = [[p for p in self._pairs if p[1] is r] for r in RELATIONS]
        words = {
            *ADJECTIVES,
            *NOUNS,
            *(v for r in RELATIONS for v in r.values),
            *(w for r in RELATIONS for w in r.name.split()),
        }
        self._words = {word: self._ids(f" {word}") for word in words}
        self._sentences = {r.name: [self._compile(f" {s}") for s in r.sentences] for r in RELATIONS}
        self._question = self._compile(str(PROMPT["user"]).format(content=QUESTION))
        self._distractors = [self._compile(f" {s}") for s in _DISTRACTORS]
        self._stop = self._ids("." + str(PROMPT["end_of_turn"]))

    def batch(self, rows: int, length: int, noise: float) -> Batch:
        shape = (rows, length)
        out = Batch(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.bool_),
            np.ones(shape, np.bool_),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.int32),
        )
        for row in range(rows):
            self._row(out, row, length, noise)
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
        at[:, answers:] = self._rng.integers(0, length - 1, (rows, text))
        target = np.take_along_axis(batch.tokens, at + 1, 1).astype(np.int64)
        running = np.take_along_axis(batch.text, at + 1, 1).astype(np.float32)
        running[:, :answers] = 0.0
        return Targets(at, target, weight, running, np.take_along_axis(batch.distance, at + 1, 1))

    # ---- one row

    def _row(self, out: Batch, row: int, length: int, noise: float) -> None:
        rng = self._rng
        # Half of the rows are dense with facts, so that many fit into the memory; half are mostly noise.
        own = (
            noise * float(rng.uniform(0.3, 1.7))
            if rng.random() < 0.5
            else float(rng.uniform(0, min(noise, 10)))
        )
        count = int(max(1, min(MAX_FACTS, length // (_FACT_TOKENS + _QUESTION_TOKENS + own))))
        asked = max(count, min(3 * count, 6))
        told = self._draw(count)
        at_end = rng.random() < 0.5
        events = self._order(told, asked, at_end)
        room = length - (len(events) - asked) * _FACT_TOKENS - asked * _QUESTION_TOKENS
        while room < 0:  # only a row too short for its questions
            if events.pop()[1]:
                room += _QUESTION_TOKENS
            else:
                room += _FACT_TOKENS
        share = rng.exponential(1.0, len(events) + 1)
        share[-1] *= 0.1  # little text after the last question: nothing is learned from it
        questions = np.fromiter((q for _, q in events), np.bool_, len(events))
        follows = questions & np.concatenate([[False], questions[:-1]])  # a question right after another
        share[:-1][follows & (rng.random(len(events)) < (0.9 if at_end else 0.5))] = 0.0
        first = questions & ~follows
        share[:-1][first] *= rng.choice([0.0, 1.0, 4.0], len(events))[first]
        gaps = (share * (room / max(share.sum(), 1e-9))).tolist()
        self._fill(out, row, events, gaps)

    def _draw(self, count: int) -> list[_Told]:
        """Facts about different (entity, relation) pairs; now and then an entity has two. Half of the rows
        keep to one relation, so that nothing but the entity tells their facts apart."""
        told: dict[tuple[str, str], _Told] = {}
        entities: set[str] = set()
        one = self._rng.random() < 0.5
        pool = self._by_relation[int(self._rng.integers(len(RELATIONS)))] if one else self._pairs
        picks = iter(self._rng.integers(len(pool), size=8 * count + 16).tolist())
        while len(told) < count:
            entity, relation = pool[next(picks)]
            if entity not in entities or self._rng.random() < 0.5:
                told[entity, relation.name] = _Told(entity, relation)
                entities.add(entity)
        return list(told.values())

    def _order(self, told: list[_Told], asked: int, at_end: bool) -> list[tuple[_Told, bool]]:
        """(fact, is it a question): facts in order, each asked after it was told, most of them long after."""
        rng = self._rng
        n = len(told)
        places = [[float(i), 0.0, i] for i in range(n)]
        for i in range(1, n):
            if rng.random() < _UPDATE:
                places.append([i + 0.5, 0.0, int(rng.integers(i))])  # told once more, with another value
        who = np.concatenate([rng.permutation(n) for _ in range(-(-asked // n))])[:asked]
        late = np.sqrt(rng.random(asked))
        for i, u in zip(who.tolist(), late.tolist(), strict=True):
            places.append([float(n) if at_end else np.ceil(i + (n - i) * u) - 0.25 + 1e-3, 1.0, i])
        places.sort(key=lambda place: (place[0], place[1]))
        return [(told[int(i)], bool(q)) for _, q, i in places]

    def _fill(self, out: Batch, row: int, events: list[tuple[_Told, bool]], gaps: list[float]) -> None:
        rng = self._rng
        tokens, length = out.tokens[row], out.tokens.shape[1]
        stream = self._streams[int(np.searchsorted(self._shares, rng.random() * self._shares[-1], "right"))]
        start = self._jump(stream, length)
        at, owed = 0, 0.0
        for (fact, question), gap in zip(events, gaps, strict=False):
            owed += gap
            if gap:
                if rng.random() < _DISTRACTOR:
                    piece = self._distractor()
                    at = self._put(tokens, at, piece)
                    owed -= len(piece)
                if rng.random() < 0.1:
                    start = self._jump(stream, length)
                end = int(stream.ends[np.searchsorted(stream.ends, start + owed, "right") - 1])
                if end > start and at + end - start <= length:
                    tokens[at : at + end - start] = stream.tokens[start:end]
                    at += end - start
                    owed -= end - start
                    start = end
            if question:
                piece = self._render(self._question, fact)
                answer = self._words[fact.value]
                after = at + len(piece)
                if after + len(answer) + len(self._stop) > length:
                    break
                at = self._put(tokens, at, piece + answer + self._stop)
                out.answer[row, after : after + len(answer)] = True
                out.text[row, after : after + len(answer)] = False
                out.distance[row, after : after + len(answer)] = after - fact.end
                owed -= len(piece) + len(answer) + len(self._stop) - _QUESTION_TOKENS
            else:
                fact.value = self._other_value(fact)
                piece = self._render(self._pick(self._sentences[fact.relation.name], 0.2), fact)
                if at + len(piece) > length:
                    break
                out.fact[row, at : at + len(piece)] = 1
                out.fact[row, at + len(piece) - 2] = 2  # every sentence ends with its value and a full stop
                out.text[row, at : at + len(piece)] = False
                at = fact.end = self._put(tokens, at, piece)
                owed -= len(piece) - _FACT_TOKENS
        tokens[at:] = stream.tokens[start : start + length - at]

    # ---- pieces

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _compile(self, template: str) -> _Piece:
        """Token ids and, between them, the names of fields; a field takes the space before it with it."""
        piece: _Piece = []
        for part in re.split(r"( \{\w+\})", template):
            if part.startswith(" {"):
                piece.append(part[2:-1])
            elif part:
                piece.extend(self._ids(part))
        return piece

    def _render(self, piece: _Piece, fact: _Told) -> list[int]:
        ids: list[int] = []
        for part in piece:
            if isinstance(part, int):
                ids.append(part)
            elif part == "value":
                ids += self._words[fact.value]
            else:
                for word in (fact.entity if part == "entity" else fact.relation.name).split():
                    ids += self._words[word]
        return ids

    def _distractor(self) -> list[int]:
        entity, relation = self._pairs[int(self._rng.integers(len(self._pairs)))]
        other, _ = self._pairs[int(self._rng.integers(len(self._pairs)))]
        fields = {
            "entity": entity,
            "other": other,
            "value": relation.values[int(self._rng.integers(len(relation.values)))],
            "adjective": entity.split()[0],
            "noun": other.split()[1],
        }
        ids: list[int] = []
        for part in self._pick(self._distractors, 1 / len(_DISTRACTORS)):
            if isinstance(part, int):
                ids.append(part)
            else:
                for word in fields[part].split():
                    ids += self._words[word]
        return ids

    def _pick(self, pieces: list[_Piece], first: float) -> _Piece:
        """One of them, the first (the canonical form) with the given probability."""
        if self._rng.random() < first:
            return pieces[0]
        return pieces[1 + int(self._rng.integers(len(pieces) - 1))]

    def _other_value(self, fact: _Told) -> str:
        values = fact.relation.values
        drawn = int(self._rng.integers(len(values)))
        return values[drawn] if values[drawn] != fact.value else values[drawn - 1]

    def _jump(self, stream: Stream, length: int) -> int:
        """A sentence end with at least ``length`` tokens after it."""
        last = int(np.searchsorted(stream.ends, len(stream.tokens) - length, "left"))
        if last == 0:
            raise ValueError(
                f"the background text has {len(stream.tokens)} tokens, too few for rows of {length}"
            )
        return int(stream.ends[int(self._rng.integers(last))])

    @staticmethod
    def _put(tokens: NDArray[np.int32], at: int, piece: list[int]) -> int:
        end = min(at + len(piece), len(tokens))
        tokens[at:end] = piece[: end - at]
        return end
