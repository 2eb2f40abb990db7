"""Rows to numbers, counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mnemosyne.training.babilong import report
from mnemosyne.training.babilong.grading import wilson
from mnemosyne.training.experiments import figures

FACTS = {"bytes_per_token": 3.0, **{f"qa{i}": {"most_frequent": 0.5} for i in range(1, 7)}}


def row(task: str, length: int, index: int, right: bool, **values: Any) -> dict[str, Any]:
    known = {"only": right, "tokens": length, "bytes": 3 * length, "repeats": 0.1, "depths": [0.5]}
    return {
        "key": [task, length, index],
        "right": right,
        "seconds": 1.0,
        "failed_attempts": [],
        **known,
        **values,
    }


@pytest.fixture
def found() -> dict[str, Any]:
    rows = [row(f"qa{t}", 1000, i, i < t, depths=[i / 8, 0.99]) for t in range(1, 6) for i in range(8)]
    rows += [row("qa6", 1000, 0, True, only=None, depths=[], bytes=4000, repeats=2.5)]
    rows += [row("qa1", 16_000, i, True, failed_attempts=["busy"] * i) for i in range(3)]
    return report.summary(FACTS, rows, {("qa1", 16_000, 3): "gone"})


def test_numbers(found: dict[str, Any]) -> None:
    by = {(entry["task"], entry["length"]): entry for entry in found["results"]}
    assert list(by)[:2] == [("qa1", 1000), ("qa1", 16_000)]
    three = by["qa3", 1000]
    assert (three["right"], three["samples"], three["accuracy"]) == (3, 8, 0.375)
    assert (three["low"], three["high"]) == wilson(3, 8)
    # Depths 0, 1/8, ... 7/8 of which the first three are right.
    assert [(d["right"], d["samples"]) for d in three["by_depth"]] == [(2, 2), (1, 2), (0, 1), (0, 2), (0, 1)]
    assert by["qa1", 16_000]["failed_attempts"] == 3
    assert by["qa6", 1000]["only"] is None and by["qa6", 1000]["by_depth"] == []
    assert by["qa6", 1000]["bytes_per_token"] == 4.0
    (mean,) = found["mean_qa1_to_qa5"]  # at 16,000 only one of the five was asked
    assert (mean["length"], mean["samples"], mean["accuracy"]) == (1000, 40, 0.375)
    assert (mean["low"], mean["high"]) == wilson(15, 40)


def test_tables_and_notes(found: dict[str, Any]) -> None:
    results, mean, depth = report.tables(found)
    low, high = (round(100 * x) for x in wilson(3, 8))
    assert results.rows[3][:6] == ["qa3", "1k", "8", f"38 ({low}-{high})", f"38 ({low}-{high})", "50"]
    assert results.columns[-1] == "retries" and [row[-1] for row in results.rows[:4]] == ["0", "3", "0", "0"]
    assert [len(row) for row in results.rows] == [len(results.columns)] * 7
    assert mean.rows[0][:2] == ["1k", "40"]
    assert depth.rows[3] == ["qa3", "1k", "2/2", "1/2", "0/1", "0/2", "0/1"]
    bytes_note, repeat_note = report.warnings(found)
    assert "3.00 bytes a token" in bytes_note and "at 1k: text repeats" in repeat_note


def test_the_figure_is_drawn(found: dict[str, Any], tmp_path: Path) -> None:
    picture = figures.draw(report.figure(found), tmp_path).read_text(encoding="utf-8")
    for text in ("tokens read", "mean of qa1 to qa5", "qa1 at 16k", "by depth"):
        assert text in picture
