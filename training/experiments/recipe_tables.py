"""The recipe's runs as tables and panels. Knows of a run its change and the row that it left; makes none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mnemosyne.training.experiments.recipe_changes import BASE, LONGER, Change, Setting
from mnemosyne.training.experiments.report import Line, Panel, Table

Row = dict[str, Any]
"""A run: its name, its setting, and what ``recipe_run.run`` found."""
NOT_FINITE = "not finite"


def share(right: float, asked: int) -> str:
    return f"{right / asked:.1%}" if asked else "-"


def answers(judged: Mapping[str, Any]) -> str:
    """Far answers that are right."""
    return share(judged["right_far"], judged["far"]) if judged["finite"] else NOT_FINITE


def summary(row: Row) -> str:
    """A line for a terminal."""
    trained, longer = map(answers, row["judged"])
    return f"{row['name']}: {trained}, {LONGER} times as long {longer}, {row['speed']:,.0f} tokens/s"


def tables(setting: Setting, changes: Sequence[Change], there: Mapping[str, Row]) -> list[Table]:
    """What every change did, in the changes' order; a run that isn't there has a row that says so."""
    counts = (
        [f"{judged['far']:,}" for judged in next(iter(there.values()))["judged"]] if there else ["-", "-"]
    )
    devices = ", ".join(sorted({row["device"] for row in there.values()}))
    lengths = [setting.length, LONGER * setting.length]
    what = [
        "what differs",
        *(f"right, rows of {length:,}" for length in lengths),
        "nats of text",
        "noise stored",
        "theta at facts",
        "tokens/s",
        "readings not finite",
    ]
    title = (
        f"Far answers right ({counts[0]} and {counts[1]} were asked, of facts more than {setting.far} tokens "
        f"ago), after {setting.steps * setting.step_tokens / 1e6:.2g}M tokens, on {devices or 'no device'}"
    )
    rows = [[change.name, *_cells(there.get(change.name), len(what) - 1)] for change in changes]
    return [
        Table(title=title, columns=what, rows=[*rows, _floor(there, len(what))]),
        _by_task(setting, changes, there),
    ]


def _cells(row: Row | None, count: int) -> list[str]:
    if row is None:
        return ["not run", *["-"] * (count - 1)]
    judged = row["judged"][0]
    told = [f"{judged['text']:.2f}", f"{judged['written']:.1%}", f"{judged['theta']:.0%}"]
    return [
        *(answers(one) for one in row["judged"]),
        *(told if judged["finite"] else ["-"] * len(told)),
        f"{row['speed']:,.0f}",
        f"{row['lost']} of {len(row['curve'])}",
    ]


def _floor(there: Mapping[str, Row], count: int) -> list[str]:
    """What knowing the tasks and no fact is worth."""
    any_row = next(iter(there.values()), None)
    floors = [f"{judged['floor']:.1%}" for judged in any_row["judged"]] if any_row else ["-", "-"]
    return ["a task's most frequent answer, always", *floors, *["-"] * (count - 3)]


def _by_task(setting: Setting, changes: Sequence[Change], there: Mapping[str, Row]) -> Table:
    names = list(next(iter(there.values()))["judged"][0]["tasks"]) if there else []
    rows = []
    for change in changes:
        if change.name not in there:
            continue
        trained, longer = (judged["tasks"] for judged in there[change.name]["judged"])
        rows.append(
            [change.name, *(f"{trained[name]:.0%} / {longer.get(name, math.nan):.0%}" for name in names)]
        )
    title = f"The same by task, in rows of {setting.length:,} / of {LONGER * setting.length:,}"
    return Table(title=title, columns=["run", *names], rows=rows)


def panels(setting: Setting, changes: Sequence[Change], there: Mapping[str, Row]) -> list[Panel]:
    """The runs' curves, group by group beside the base's, and how they do in longer rows."""
    groups = list(dict.fromkeys(change.group for change in changes))
    made = []
    for group in groups:
        shown = [c for c in changes if c.name in there and (c.group == group or c.name == BASE)]
        lines = [_curve(setting, there[change.name]) for change in shown]
        title = "three seeds" if group == BASE else group
        made.append(
            Panel(title=title, x="tokens", y="tokens of far answers right in training, %", lines=lines)
        )
    points = []
    for group in groups:
        pairs = [
            [100 * judged["right_far"] / max(1, judged["far"]) for judged in there[change.name]["judged"]]
            for change in changes
            if change.group == group and change.name in there
        ]
        points.append(Line(label=group, x=[p[0] for p in pairs], y=[p[1] for p in pairs], joined=False))
    axes = (f"right in rows of {length:,}, %" for length in (setting.length, LONGER * setting.length))
    made.append(Panel(title="longer rows than those of training", x=next(axes), y=next(axes), lines=points))
    return made


def _curve(setting: Setting, row: Row) -> Line:
    curve = row["curve"]
    step = setting.steps * setting.step_tokens / len(curve)
    return Line(label=row["name"], x=[(i + 1) * step for i in range(len(curve))], y=[100 * y for y in curve])
