"""Rows that tell invented facts among running text and ask about them later. Owns what such a row looks like;
knows no model.

``noise`` is the mean number of background tokens that come with each fact: the curriculum's one dial.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from mnemosyne.training.corpus import Stream
from mnemosyne.training.facts import ADJECTIVES, NOUNS, PROMPT, QUESTION, RELATIONS, Relation, Split, pairs
from mnemosyne.training.rows import Batch, Rows

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


_Piece = list[int | str]


@dataclass
class _Told:
    """A fact inside one row: its latest value and where that was told."""

    entity: str
    relation: Relation
    value: str = ""
    end: int = 0


class Sampler(Rows):
    def __init__(
        self,
        tokenizer: Tokenizer,
        streams: Sequence[tuple[Stream, float]],
        seed: int,
        split: Split = "train",
    ) -> None:
        super().__init__(tokenizer, streams, seed)
        self._pairs = pairs(split)
        self._by_relation = [[p for p in self._pairs if p[1] is r] for r in RELATIONS]
        words = {
            *ADJECTIVES,
            *NOUNS,
            *(v for r in RELATIONS for v in r.values),
            *(w for r in RELATIONS for w in r.name.split()),
        }
        self._words = {word: self.ids(f" {word}") for word in words}
        self._sentences = {r.name: [self._compile(f" {s}") for s in r.sentences] for r in RELATIONS}
        self._question = self._compile(str(PROMPT["user"]).format(content=QUESTION))
        self._distractors = [self._compile(f" {s}") for s in _DISTRACTORS]

    # ---- one row

    def row(self, out: Batch, row: int, length: int, noise: float) -> None:
        rng = self.rng
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
        one = self.rng.random() < 0.5
        pool = self._by_relation[int(self.rng.integers(len(RELATIONS)))] if one else self._pairs
        picks = iter(self.rng.integers(len(pool), size=8 * count + 16).tolist())
        while len(told) < count:
            entity, relation = pool[next(picks)]
            if entity not in entities or self.rng.random() < 0.5:
                told[entity, relation.name] = _Told(entity, relation)
                entities.add(entity)
        return list(told.values())

    def _order(self, told: list[_Told], asked: int, at_end: bool) -> list[tuple[_Told, bool]]:
        """(fact, is it a question): facts in order, each asked after it was told, most of them long after."""
        rng = self.rng
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
        rng = self.rng
        tokens, length = out.tokens[row], out.tokens.shape[1]
        stream = self.source()
        start = self.jump(stream, length)
        at, owed = 0, 0.0
        for (fact, question), gap in zip(events, gaps, strict=False):
            owed += gap
            if gap:
                if rng.random() < _DISTRACTOR:
                    piece = self._distractor()
                    at = self.put(tokens, at, piece)
                    owed -= len(piece)
                if rng.random() < 0.1:
                    start = self.jump(stream, length)
                end = int(stream.ends[stream.ended(int(start + owed)) - 1])
                if end > start and at + end - start <= length:
                    tokens[at : at + end - start] = stream.tokens[start:end]
                    at += end - start
                    owed -= end - start
                    start = end
            if question:
                piece = self._render(self._question, fact)
                answer = self._words[fact.value]
                after = at + len(piece)
                if after + len(answer) + len(self.stop) > length:
                    break
                at = self.put(tokens, at, piece + answer + self.stop)
                out.answer[row, after : after + len(answer)] = True
                out.text[row, after : after + len(answer)] = False
                out.distance[row, after : after + len(answer)] = after - fact.end
                owed -= len(piece) + len(answer) + len(self.stop) - _QUESTION_TOKENS
            else:
                fact.value = self._other_value(fact)
                piece = self._render(self._pick(self._sentences[fact.relation.name], 0.2), fact)
                if at + len(piece) > length:
                    break
                out.fact[row, at : at + len(piece)] = 1
                out.fact[row, at + len(piece) - 2] = 2  # every sentence ends with its value and a full stop
                out.text[row, at : at + len(piece)] = False
                at = fact.end = self.put(tokens, at, piece)
                owed -= len(piece) - _FACT_TOKENS
        tokens[at:] = stream.tokens[start : start + length - at]

    # ---- pieces

    def _compile(self, template: str) -> _Piece:
        """Token ids and, between them, the names of fields; a field takes the space before it with it."""
        piece: _Piece = []
        for part in re.split(r"( \{\w+\})", template):
            if part.startswith(" {"):
                piece.append(part[2:-1])
            elif part:
                piece.extend(self.ids(part))
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
        entity, relation = self._pairs[int(self.rng.integers(len(self._pairs)))]
        other, _ = self._pairs[int(self.rng.integers(len(self._pairs)))]
        fields = {
            "entity": entity,
            "other": other,
            "value": relation.values[int(self.rng.integers(len(relation.values)))],
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
        if self.rng.random() < first:
            return pieces[0]
        return pieces[1 + int(self.rng.integers(len(pieces) - 1))]

    def _other_value(self, fact: _Told) -> str:
        values = fact.relation.values
        drawn = int(self.rng.integers(len(values)))
        return values[drawn] if values[drawn] != fact.value else values[drawn - 1]
