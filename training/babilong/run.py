"""A run: samples made, read and answered side by side, each finished one kept in a file. Owns order, repeats
and what is kept; knows no HTTP (the reader does).

``samples.jsonl`` has a first line that says what the samples are a function of, then one line a finished
sample. A run over the same folder goes on after them, and refuses a file of other data, another seed or
another model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training.babilong import grading
from mnemosyne.training.babilong.samples import Asked, Key, Maker, Sample

ATTEMPTS = 4
"""At one sample, before it counts as failed."""
FIRST_DELAY = 1.0
"""Seconds before the second attempt; each wait is four times the one before it."""
GIVE_UP = 10
"""Samples that fail in a row before the run stops: then it isn't the samples."""
ONLY_RULE = ("qa1", "qa2", "qa3", "qa4", "qa5")
"""Tasks that BABILong has its later rule for."""


@dataclass(frozen=True)
class Answer:
    text: str
    seconds: float
    """From the session's beginning to the answer's end."""


@dataclass(frozen=True)
class Failure:
    """No answer came; the sample is tried again. What no repeat can mend, the reader raises."""

    message: str


Reader = Callable[[Sample, threading.Event], Answer | Failure]
"""Has one session read a sample and asks it. Returns early once the event is set."""
Row = dict[str, Any]


@dataclass
class Outcome:
    rows: list[Row]
    """Of finished samples, those of earlier runs too."""
    failed: dict[Key, str] = field(default_factory=dict)
    """Samples without an answer, and why: they are in no row and are asked by the next run."""


class Journal:
    """The file of finished samples. One writer."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Raises ConfigError where the file is of a run of which one of ``facts`` was another; new ones are
        added to it (a task that wasn't asked before)."""
        earlier, self.rows = _read(path)
        if wrong := _others(earlier, facts):
            raise ConfigError(
                f"{path} was made with another {wrong}: results don't mix, choose another --out"
            )
        self.facts = {**earlier, **facts}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".part")
        aside.write_text("".join(map(_line, [self.facts, *self.rows])), encoding="utf-8")
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def together(paths: Sequence[Path]) -> tuple[dict[str, Any], list[Row]]:
    """Facts and rows of the files of several runs, each sample once; they may be under way.

    Raises ConfigError for one that isn't there, and for runs of other data, another seed or another model.
    """
    facts: dict[str, Any] = {}
    rows: dict[Key, Row] = {}
    for path in paths:
        more, some = _read(path)
        if not more:
            raise ConfigError(f"{path} isn't there or is empty: name folders that eval babilong wrote to")
        if wrong := _others(facts, more):
            raise ConfigError(f"{path} was made with another {wrong} than {paths[0]}: results don't mix")
        facts |= more
        rows |= {tuple(row["key"]): row for row in some}
    return facts, list(rows.values())


def run(
    asked: Sequence[Asked],
    maker: Maker,
    reader: Reader,
    journal: Journal,
    parallel: int,
    on_done: Callable[[Row | Failure], None] = lambda _: None,
) -> Outcome:
    """Answer every sample that the journal hasn't, ``parallel`` at once.

    Raises what the reader raises, and ConfigError after ``GIVE_UP`` failures in a row; what was finished is
    kept.
    """
    done = {tuple(row["key"]) for row in journal.rows}
    todo = [sample for sample in asked if sample.key not in done]
    outcome = Outcome(journal.rows)
    stopping = threading.Event()
    pool = ThreadPoolExecutor(parallel)
    futures: dict[Future[Row | Failure], Asked] = {
        pool.submit(_answer, one, maker, reader, stopping): one for one in todo
    }
    in_a_row = 0
    try:
        for future in as_completed(futures):
            result = future.result()
            on_done(result)
            if isinstance(result, Failure):
                outcome.failed[futures[future].key] = result.message
                in_a_row += 1
                if in_a_row == GIVE_UP:
                    raise ConfigError(
                        f"{GIVE_UP} samples failed one after the other, the last: {result.message}"
                    )
            else:
                journal.add(result)
                in_a_row = 0
    finally:
        stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return outcome


def _answer(asked: Asked, maker: Maker, reader: Reader, stopping: threading.Event) -> Row | Failure:
    sample = maker.make(asked.task, asked.length, asked.index, asked.question)
    failures: list[str] = []
    delay = FIRST_DELAY
    while True:
        result = reader(sample, stopping)
        if isinstance(result, Answer):
            return _row(sample, result, failures)
        failures.append(result.message)
        if len(failures) == ATTEMPTS or stopping.wait(delay):
            return Failure(f"{result.message} ({len(failures)} attempts)")
        delay *= 4


def _row(sample: Sample, answer: Answer, failures: Sequence[str]) -> Row:
    only = sample.key[0] in ONLY_RULE
    return {
        "key": list(sample.key),
        "question": sample.question,
        "target": sample.answer,
        "answer": answer.text,
        "right": grading.contains(answer.text, sample.answer),
        "only": grading.names_only(answer.text, sample.answer, sample.question, sample.labels)
        if only
        else None,
        "tokens": sample.tokens,
        "bytes": sample.nbytes,
        "repeats": sample.repeats,
        "depths": list(sample.depths),
        "seconds": answer.seconds,
        "failed_attempts": list(failures),
    }


def _others(facts: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Names of what both have, and not the same."""
    return ", ".join(name for name in others if name in facts and facts[name] != others[name])


def _read(path: Path) -> tuple[Row, list[Row]]:
    """First line and rows; of a file that isn't there, nothing. A last line without an end was cut off."""
    if not path.exists():
        return {}, []
    try:
        facts, *rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] or [{}]
        if not isinstance(facts, dict) or (facts and "seed" not in facts):
            raise ValueError("its first line names no seed")
    except ValueError as error:
        raise ConfigError(f"{path} isn't the file of a run: {error}") from error
    return facts, rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
