"""The bAbI tasks as their files tell them: stories, questions, answers, and the facts an answer rests on.
Owns the format; knows no background and no token.

A line is ``NUMBER SENTENCE`` or ``NUMBER QUESTION<tab>ANSWER<tab>NUMBERS OF THE FACTS``; number 1 begins a
new story. Every question becomes a sample of its own, with the story's facts up to it and without its other
questions, as BABILong makes them (github.com/booydar/babilong, ``babilong_utils.py``).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training.books import read_text

_LINE = re.compile(r"(\d+) (.+)")
TASKS = 10
"""BABILong's tables have the first ten."""
PREFERRED = "_test"
"""What the name ends with where a folder holds several files of a task."""


@dataclass(frozen=True)
class Question:
    story: int
    """Which one of the file it is asked about."""
    facts: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]
    """Which of the facts it rests on, rising; empty where the file doesn't say."""


@dataclass(frozen=True)
class Task:
    number: int
    file: str
    sha256: str
    """Of the file as it lies there."""
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        return f"qa{self.number}"

    @property
    def most_frequent(self) -> float:
        """The share of its most frequent answer: what always giving that one would get."""
        counts = Counter(question.answer for question in self.questions)
        return max(counts.values()) / len(self.questions)

    @property
    def answers(self) -> frozenset[str]:
        return frozenset(question.answer for question in self.questions)


def parse_numbers(text: str) -> list[int]:
    """``1-5,7`` as numbers, rising. Raises ConfigError for anything but tasks 1 to 10."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= TASKS:
            raise ConfigError(f"tasks are numbers from 1 to {TASKS} such as 1-5 or 1,2,7, not {text!r}")
        numbers |= set(range(first, last + 1))
    return sorted(numbers)


def load_task(folder: Path, number: int) -> Task:
    """Task ``number`` of a folder of bAbI files, ``qa1_....txt`` or ``.txt.xz``.

    Raises ConfigError where there is none, or several of which none is the test half, or one that isn't bAbI.
    """
    path = _find(folder, number)
    questions = parse(read_text(path), str(path))
    if not questions:
        raise ConfigError(f"{path} asks no question: it isn't a bAbI task")
    return Task(number, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), tuple(questions))


def parse(text: str, name: str) -> list[Question]:
    """Every question of a file's text; ``name`` is for the messages. Raises ConfigError with the line."""
    questions: list[Question] = []
    facts: list[str] = []
    places: dict[int, int] = {}
    story = -1
    for row, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None or (story < 0 and match[1] != "1"):
            raise ConfigError(f"{name}, line {row} isn't bAbI, which numbers its lines from 1: {line[:60]!r}")
        number, (said, *rest) = int(match[1]), match[2].split("\t")
        if number == 1:
            story, facts, places = story + 1, [], {}
        if not rest:
            places[number] = len(facts)
            facts.append(said.strip())
            continue
        try:
            supporting = {places[int(n)] for part in rest[1:] for n in part.split()}
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{name}, line {row} rests on a fact that isn't there: {error}") from error
        if not facts or not rest[0].strip():
            raise ConfigError(f"{name}, line {row} asks without a fact before it or without an answer")
        asked = said.strip(), rest[0].strip()
        questions.append(Question(story, tuple(facts), *asked, tuple(sorted(supporting))))
    return questions


def _find(folder: Path, number: int) -> Path:
    pattern = re.compile(rf"qa{number}[_.](.*\.)?txt(\.xz)?")
    found = sorted(path for path in folder.glob("qa*") if pattern.fullmatch(path.name))
    if not found:
        raise ConfigError(
            f"there is no bAbI task {number} in {folder}: put the files of the task there, English, such as "
            f"qa{number}_..._test.txt or .txt.xz (Facebook's bAbI tasks 1-20, v1.2, folder en-10k)"
        )
    halves = [path for path in found if path.name.split(".")[0].endswith(PREFERRED)]
    chosen = halves if len(found) > 1 else found
    if len(chosen) != 1:
        names = ", ".join(path.name for path in found)
        raise ConfigError(f"{folder} has several files of task {number}, leave one of them: {names}")
    return chosen[0]
