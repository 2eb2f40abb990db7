"""Runs with a reader that the test writes: what is kept, repeated, refused, and counted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training.babilong import report, run
from mnemosyne.training.babilong.haystack import Haystack
from mnemosyne.training.babilong.run import Answer, Failure, Journal, Outcome
from mnemosyne.training.babilong.samples import Asked, Maker, Sample, plan
from mnemosyne.training.babilong.tasks import load_task

FACTS = {"seed": 1, "books": "b", "bytes_per_token": 3.5, "qa1": {"most_frequent": 0.25}}
Replies = Callable[[Sample], Answer | Failure]


@pytest.fixture(autouse=True)
def without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FIRST_DELAY", 0.001)


@pytest.fixture
def maker(haystack: Haystack, tokenizer: Tokenizer) -> Maker:
    return Maker(haystack, tokenizer, 1)


@pytest.fixture
def asked(maker: Maker, babi: Path) -> list[Asked]:
    return plan(maker, [load_task(babi, 1)], [100, 200], {100: 4, 200: 4})


def go(asked: list[Asked], maker: Maker, path: Path, reply: Replies, parallel: int = 3) -> Outcome:
    with closing(Journal(path, FACTS)) as journal:
        return run.run(asked, maker, lambda sample, _: reply(sample), journal, parallel)


def test_a_run_goes_on_where_it_stopped(asked: list[Asked], maker: Maker, tmp_path: Path) -> None:
    path, seen = tmp_path / "out" / "samples.jsonl", []

    def some(sample: Sample) -> Answer | Failure:
        seen.append(sample.key)
        return Answer(sample.answer, 1.0) if len(set(seen)) <= 3 else Failure("gone")

    first = go(asked, maker, path, some, parallel=1)
    assert len(first.rows) == 3 and set(first.failed) == {one.key for one in asked[3:]}
    # Killed in the middle of a line: that sample is asked again.
    path.write_bytes(path.read_bytes()[:-20])
    again = []

    def right(sample: Sample) -> Answer:
        again.append(sample.key)
        return Answer(sample.answer, 1.0)

    second = go(asked, maker, path, right)
    assert sorted(again) == [one.key for one in asked[2:]] and not second.failed
    assert sorted(tuple(row["key"]) for row in second.rows) == [one.key for one in asked]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == FACTS and len(lines) == 1 + len(asked)
    assert go(asked, maker, path, right).rows == second.rows and len(again) == len(asked) - 2


def test_results_of_other_data_dont_mix(asked: list[Asked], maker: Maker, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    go(asked, maker, path, lambda sample: Answer("", 1.0))
    with pytest.raises(
        ConfigError, match=r"samples\.jsonl was made with another seed, books: .*another --out"
    ):
        Journal(path, {**FACTS, "seed": 2, "books": "c"})
    Journal(path, {**FACTS, "qa2": {"most_frequent": 0.5}}).close()  # one task more is no other data
    assert json.loads(path.read_text().splitlines()[0])["qa2"] == {"most_frequent": 0.5}
    path.write_text("something else\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"samples\.jsonl isn't the file of a run"):
        Journal(path, FACTS)


def test_failures_are_repeated_and_never_wrong_answers(
    asked: list[Asked], maker: Maker, tmp_path: Path
) -> None:
    tries: dict[object, int] = {}

    def flaky(sample: Sample) -> Answer | Failure:
        tries[sample.key] = tries.get(sample.key, 0) + 1
        if sample.key[2] == 3:
            return Failure("never")
        return Answer(sample.answer, 1.0) if tries[sample.key] == 3 else Failure("not yet")

    outcome = go(asked, maker, tmp_path / "s.jsonl", flaky)
    assert set(outcome.failed) == {("qa1", 100, 3), ("qa1", 200, 3)}
    assert outcome.failed["qa1", 100, 3] == "never (4 attempts)"
    found = report.summary(FACTS, outcome.rows, outcome.failed)
    assert [(e["samples"], e["accuracy"], e["failed_attempts"]) for e in found["results"]] == [
        (3, 1.0, 6)
    ] * 2
    assert [f["sample"] for f in found["failed"]] == [["qa1", 100, 3], ["qa1", 200, 3]]


def test_a_server_that_is_gone_ends_the_run(maker: Maker, babi: Path, tmp_path: Path) -> None:
    many = plan(maker, [load_task(babi, 1)], list(range(100, 150)), dict.fromkeys(range(100, 150), 4))
    seen: set[object] = set()

    def gone(sample: Sample) -> Failure:
        seen.add(sample.key)
        return Failure("no answer")

    with pytest.raises(ConfigError, match="10 samples failed one after the other, the last: no answer"):
        go(many, maker, tmp_path / "s.jsonl", gone)
    assert len(seen) < 50
    # As many failures between answers end nothing.
    odd = go(many, maker, tmp_path / "t.jsonl", lambda s: gone(s) if s.key[2] % 2 else Answer("", 1.0), 1)
    assert len(odd.failed) == len(odd.rows) == len(many) / 2


def test_what_no_repeat_can_mend_ends_the_run_at_once(
    asked: list[Asked], maker: Maker, tmp_path: Path
) -> None:
    def wrong(sample: Sample) -> Answer:
        if sample.key[2] == 1:
            raise ConfigError("the key is wrong")
        return Answer(sample.answer, 1.0)

    with pytest.raises(ConfigError, match="the key is wrong"):
        go(asked, maker, tmp_path / "s.jsonl", wrong, parallel=1)
    assert len(go(asked[:1], maker, tmp_path / "s.jsonl", wrong).rows) == 1


def test_many_are_in_flight(asked: list[Asked], maker: Maker, tmp_path: Path) -> None:
    """Four readers that wait for one another: with fewer at once none would go on."""
    together = threading.Barrier(4, timeout=10)

    def wait(sample: Sample) -> Answer:
        together.wait()
        return Answer(sample.answer, 1.0)

    assert len(go(asked, maker, tmp_path / "s.jsonl", wait, parallel=4).rows) == 8
