"""bAbI's stories whole, for training: their splits, and the same story told of others. Owns who and what a
story is about; knows no token.

A story belongs to one split by a hash of its facts, so that the same story twice in a file, or in two files,
is never in both. Stories of one row are told of different people and things: what one of them says then
changes no answer of another, and every question may come at any time after its story.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnemosyne.training.babilong.tasks import Question, Task, load_task

Split = Literal["train", "validation"]
HELD_OUT = 28
"""Of 256 stories, those of the validation split: one in nine, which leaves 100 of QA3's questions."""
PERSONS = tuple(
    """Mary John Daniel Sandra Bill Fred Jeff Julie Alice Anna Arthur Clara David Edward Emma Frank George
    Grace Hannah Harry Henry Jack James Jane Kate Laura Lucy Mark Martha Paul Peter Robert Rose Sarah Simon
    Thomas""".split()
)
OBJECTS = tuple(
    """milk football apple basket book bottle candle coat cup hat key knife lamp letter ring rope""".split()
)
PLACES = tuple(
    """bathroom bedroom garden hallway kitchen office cinema park school attic barn cellar church library
    market station""".split()
)
"""The first of each are those of bAbI."""
RELATIONS_OF_PLACES = 4
"""The task that is about places: there they are told apart, elsewhere all stories share them."""


@dataclass(frozen=True)
class Story:
    task: int
    facts: tuple[str, ...]
    questions: tuple[Question, ...]
    """In order; a question stands after the last of its own facts."""

    @property
    def split(self) -> Split:
        digest = hashlib.sha256("\n".join(self.facts).encode()).digest()
        return "validation" if digest[0] < HELD_OUT else "train"

    def until(self, facts: int) -> Story:
        """Its beginning: at most so many facts, and the questions asked by then."""
        asked = tuple(question for question in self.questions if len(question.facts) <= facts)
        return Story(self.task, self.facts[:facts], asked)


def stories_of(task: Task) -> list[Story]:
    """The stories of a task's file, in order. Facts after a story's last question are left out."""
    grouped = itertools.groupby(task.questions, key=lambda question: question.story)
    told = [tuple(questions) for _, questions in grouped]
    return [Story(task.number, questions[-1].facts, questions) for questions in told]


def load_stories(folder: Path, numbers: Sequence[int], split: Split) -> list[list[Story]]:
    """The split's stories of each number, in order. Raises ConfigError as ``load_task`` does."""
    loaded = {number: stories_of(load_task(folder, number)) for number in sorted(set(numbers))}
    return [[story for story in loaded[number] if story.split == split] for number in numbers]


class Names:
    """Who and what the stories of one row are about; each is in one story only."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()

    def told_of_others(self, story: Story, keep: bool) -> Story | None:
        """The story about people and things that no story before it was about; with ``keep`` about its own.
        None where too few are left."""
        pools = (PERSONS, OBJECTS, PLACES) if story.task == RELATIONS_OF_PLACES else (PERSONS, OBJECTS)
        said = {word for fact in story.facts for word in _WORD.findall(fact)}
        said |= {word for question in story.questions for word in _WORD.findall(question.question)}
        renamed: dict[str, str] = {}
        for pool in pools:
            here = [name for name in pool if name in said]
            free = [name for name in pool if name not in self._taken]
            if len(free) < len(here) or (keep and not set(here) <= set(free)):
                return None
            renamed.update(zip(here, here if keep else self._rng.sample(free, len(here)), strict=True))
        self._taken |= set(renamed.values())
        return _replaced(story, renamed)


_WORD = re.compile(r"[A-Za-z]+")


def _replaced(story: Story, renamed: dict[str, str]) -> Story:
    def told(text: str) -> str:
        return _WORD.sub(lambda match: renamed.get(match[0], match[0]), text)

    facts = tuple(told(fact) for fact in story.facts)
    questions = tuple(
        Question(q.story, facts[: len(q.facts)], told(q.question), told(q.answer), q.supporting)
        for q in story.questions
    )
    return Story(story.task, facts, questions)


def written(stories: Sequence[Story]) -> str:
    """The stories in bAbI's format."""
    lines: list[str] = []
    for story in stories:
        numbers: list[int] = []
        at = itertools.count(1)
        waiting = list(story.questions)
        for i, fact in enumerate(story.facts):
            numbers.append(next(at))
            lines.append(f"{numbers[-1]} {fact}")
            while waiting and len(waiting[0].facts) == i + 1:
                q = waiting.pop(0)
                rests = " ".join(str(numbers[s]) for s in q.supporting)
                lines.append(f"{next(at)} {q.question}\t{q.answer}\t{rests}")
    return "\n".join(lines) + "\n"
