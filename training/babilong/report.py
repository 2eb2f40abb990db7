"""Finished samples as numbers, tables and a plot. Owns what is counted; draws nothing and asks nothing.

Columns of the table: ``right`` and ``only`` are the benchmark's two rules (``grading``), ``guess`` is what
the task's most frequent answer would get, ``books`` how often the background goes through the books,
``retries`` the attempts that brought no answer and were repeated, where there were any.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mnemosyne.training.babilong.grading import wilson
from mnemosyne.training.babilong.haystack import LEAST_BYTES_PER_TOKEN
from mnemosyne.training.experiments.report import Line, Panel, Result, Table
from mnemosyne.training.lengths import length_name

DEPTHS = 5
"""Parts of a sample's length by which accuracy is told: where the first fact stands that the answer rests on.
"""
MEAN = ("qa1", "qa2", "qa3", "qa4", "qa5")
"""The tasks whose mean BABILong reports."""


def share(rows: Sequence[Mapping[str, Any]], field: str = "right") -> dict[str, Any]:
    """How many rows, how many of them right, and the share with its interval."""
    right, count = sum(bool(row[field]) for row in rows), len(rows)
    low, high = wilson(right, count)
    return {"samples": count, "right": right, "accuracy": right / count, "low": low, "high": high}


def cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a task and length, tasks in order."""
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        task, length, _ = row["key"]
        found.setdefault((int(str(task)[2:]), int(length)), []).append(row)
    return [_cell(f"qa{task}", length, some) for (task, length), some in sorted(found.items())]


def _cell(task: str, length: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens, nbytes = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
    depths = [[row for row in rows if row["depths"] and _part(row["depths"][0]) == i] for i in range(DEPTHS)]
    return {
        "task": task,
        "length": length,
        **share(rows),
        "only": share(rows, "only") if rows[0]["only"] is not None else None,
        "tokens": tokens / len(rows),
        "bytes": nbytes / len(rows),
        "bytes_per_token": nbytes / tokens,
        "repeats": max(row["repeats"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows) / len(rows),
        "failed_attempts": sum(len(row["failed_attempts"]) for row in rows),
        "by_depth": [
            {"from": i / DEPTHS, "to": (i + 1) / DEPTHS, **share(some)}
            for i, some in enumerate(depths)
            if some
        ],
    }


def means(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By length, the mean of QA1 to QA5 where all five were asked; the interval is that of their pooled
    answers."""
    out = []
    for length in sorted({entry["length"] for entry in entries}):
        five = [entry for entry in entries if entry["length"] == length and entry["task"] in MEAN]
        if len(five) == len(MEAN):
            right, count = (sum(entry[name] for entry in five) for name in ("right", "samples"))
            low, high = wilson(right, count)
            mean = math.fsum(entry["accuracy"] for entry in five) / len(five)
            out.append({"length": length, "samples": count, "accuracy": mean, "low": low, "high": high})
    return out


def summary(
    facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], failed: Mapping[Any, str]
) -> dict[str, Any]:
    """All of a run as JSON has it; ``facts`` say what it was made with."""
    entries = cells(rows)
    return {
        **facts,
        "results": entries,
        "mean_qa1_to_qa5": means(entries),
        "failed": [{"sample": list(key), "error": message} for key, message in sorted(failed.items())],
    }


def tables(found: Mapping[str, Any]) -> list[Table]:
    entries = found["results"]
    repeated = any(entry["failed_attempts"] for entry in entries)
    rows = [
        [
            entry["task"],
            length_name(entry["length"]),
            str(entry["samples"]),
            _percent(entry),
            _percent(entry["only"]) if entry["only"] else "",
            f"{100 * found[entry['task']]['most_frequent']:.0f}",
            f"{entry['bytes'] / 1e6:.3f}",
            f"{entry['bytes_per_token']:.2f}",
            f"{entry['repeats']:.3f}",
            *([str(entry["failed_attempts"])] if repeated else []),
        ]
        for entry in entries
    ]
    columns = ["task", "tokens", "n", "right", "only", "guess", "MB", "B/token", "books"]
    columns += ["retries"] if repeated else []
    made = [Table(title="right answers, %, with 95 % intervals", columns=columns, rows=rows)]
    if found["mean_qa1_to_qa5"]:
        mean = [[length_name(m["length"]), str(m["samples"]), _percent(m)] for m in found["mean_qa1_to_qa5"]]
        made.append(Table(title="mean of QA1 to QA5", columns=["tokens", "n", "right"], rows=mean))
    if any(entry["by_depth"] for entry in entries):
        made.append(_depth_table(entries))
    return made


def _depth_table(entries: Iterable[Mapping[str, Any]]) -> Table:
    names = [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS} %" for i in range(DEPTHS)]
    rows = []
    for entry in entries:
        parts = {round(part["from"] * DEPTHS): part for part in entry["by_depth"]}
        told = [f"{p['right']}/{p['samples']}" if (p := parts.get(i)) else "" for i in range(DEPTHS)]
        rows.append([entry["task"], length_name(entry["length"]), *told])
    title = "right answers by where the first fact stands that the answer rests on"
    return Table(title=title, columns=["task", "tokens", *names], rows=rows)


def figure(found: Mapping[str, Any]) -> Result:
    """What ``experiments.figures`` draws: accuracy by length, and by depth."""
    entries = found["results"]
    tasks = sorted({entry["task"] for entry in entries}, key=lambda name: int(name[2:]))
    by_length = [_line(task, [e for e in entries if e["task"] == task], "length") for task in tasks]
    if found["mean_qa1_to_qa5"]:
        by_length.append(_line("mean of qa1 to qa5", found["mean_qa1_to_qa5"], "length"))
    panels = [
        Panel(title="by length", x="tokens read", y="right, %", lines=by_length, logarithmic="x"),
        *_depth_panels(entries, tasks),
    ]
    return Result(name="babilong", size="", setting={}, machine="", tables=[], panels=panels)


def _depth_panels(entries: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Panel]:
    """The longest length of each task."""
    lines = []
    for task in tasks:
        longest = max((e for e in entries if e["task"] == task), key=lambda e: int(e["length"]))
        parts = [{**part, "middle": 50 * (part["from"] + part["to"])} for part in longest["by_depth"]]
        if parts:
            lines.append(_line(f"{task} at {length_name(longest['length'])}", parts, "middle"))
    title, x = "by depth", "first needed fact, % of the text before it"
    return [Panel(title=title, x=x, y="right, %", lines=lines)] if lines else []


def _line(label: str, points: Sequence[Mapping[str, Any]], x: str) -> Line:
    below = [100 * (p["accuracy"] - p["low"]) for p in points]
    above = [100 * (p["high"] - p["accuracy"]) for p in points]
    return Line(
        label=label, x=[p[x] for p in points], y=[100 * p["accuracy"] for p in points], half=(below, above)
    )


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    said = []
    least = found["bytes_per_token"]
    if least < LEAST_BYTES_PER_TOKEN:
        said.append(
            f"the tokenizer gives {least:.2f} bytes a token on these books, fewer than "
            f"{LEAST_BYTES_PER_TOKEN}: lengths in tokens don't compare with other models'"
        )
    repeated = {length_name(e["length"]) for e in found["results"] if e["repeats"] > 1}
    if repeated:
        said.append(
            f"the books are shorter than the background at {', '.join(sorted(repeated))}: text repeats"
        )
    return said


def _percent(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['accuracy']:.0f} ({100 * entry['low']:.0f}-{100 * entry['high']:.0f})"


def _part(depth: float) -> int:
    return min(DEPTHS - 1, int(depth * DEPTHS))
