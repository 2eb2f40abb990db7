"""The recipe's runs as tables and panels. Knows of a run its change and the row that it left; makes none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnemosyne.training.experiments.recipe_changes import BASE, LONGER, Change, Setting
from mnemosyne.training.experiments.report import Line, Panel, Table

Row = dict[str, Any]
"""A run: its name, its setting, and what ``recipe_run.run`` found."""
NOT_FINITE = "not finite"


def answers(judged: Mapping[str, Any]) -> str:
    """Far answers that are right."""
    return f"{judged['right_far'] / max(1, judged['far']):.1%}" if judged["finite"] else NOT_FINITE


def summary(row: Row) -> str:
    """A line for a terminal."""
    trained, longer = map(answers, row["judged"])
    return f"{row['name']}: {trained}, {LONGER} times as long {longer}, {row['speed']:,.0f} tokens/s"


def tables(setting: Setting, changes: Sequence[Change], there: Mapping[str, Row]) -> list[Table]:
    """What every change did, in the changes' order; a run that isn't there has a row that says so."""
    counts = [f"{judged['far']:,}" for judged in next(iter(there.values()))["judged"]] if there else ["-"] * 2
    devices = ", ".join(sorted({row["device"] for row in there.values()}))
    what = [
        "what differs",
        f"right, rows of {setting.length:,}",
        "points",
        f"right, rows of {LONGER * setting.length:,}",
        "points",
        "nats of text",
        "noise stored",
        "theta at facts",
        "tokens/s",
        "readings not finite",
    ]
    title = (
        f"Far answers right ({counts[0]} and {counts[1]} were asked, of facts more than {setting.far} tokens "
        f"ago), and points from the mean of the base's seeds, after "
        f"{setting.steps * setting.step_tokens:,} tokens, on {devices or 'no device'}"
    )
    bases = [_rights(there[c.name]) for c in changes if c.group == BASE and c.name in there]
    shares = list(zip(*bases, strict=True)) or [(), ()]
    rows = [[change.name, *_cells(there.get(change.name), shares, len(what) - 1)] for change in changes]
    scatter = [f"{np.std(seeds, ddof=1):.1f}" if len(seeds) > 1 else "-" for seeds in shares]
    spread = ["standard deviation of the base's seeds", "-", scatter[0], "-", scatter[1]]
    return [Table(title=title, columns=what, rows=[*rows, spread + ["-"] * (len(what) - len(spread))])]


def _rights(row: Row) -> list[float]:
    """Far answers that are right, in points."""
    return [100 * judged["right_far"] / max(1, judged["far"]) for judged in row["judged"]]


def _cells(row: Row | None, bases: Sequence[Sequence[float]], count: int) -> list[str]:
    if row is None:
        return ["not run", *["-"] * (count - 1)]
    judged = row["judged"][0]
    told = [f"{judged['text']:.2f}", f"{judged['written']:.1%}", f"{judged['theta']:.0%}"]
    right: list[str] = []
    for one, mine, base in zip(row["judged"], _rights(row), bases, strict=True):
        right += [answers(one), f"{mine - np.mean(base):+.1f}" if base and one["finite"] else "-"]
    return [
        *right,
        *(told if judged["finite"] else ["-"] * len(told)),
        f"{row['speed']:,.0f}",
        f"{row['lost']} of {len(row['curve'])}",
    ]


def panels(setting: Setting, changes: Sequence[Change], there: Mapping[str, Row]) -> list[Panel]:
    """The runs' curves, group by group beside the base's, and how they do in longer rows."""
    groups = list(dict.fromkeys(change.group for change in changes))
    made = []
    for group in groups:
        shown = [c for c in changes if c.name in there and (c.group == group or c.name == BASE)]
        lines = [_curve(setting, there[change.name]) for change in shown]
        title = "the base's seeds" if group == BASE else group
        made.append(
            Panel(title=title, x="tokens", y="tokens of far answers right in training, %", lines=lines)
        )
    points = []
    for group in groups:
        pairs = [_rights(there[c.name]) for c in changes if c.group == group and c.name in there]
        points.append(Line(label=group, x=[p[0] for p in pairs], y=[p[1] for p in pairs], joined=False))
    axes = (f"right in rows of {length:,}, %" for length in (setting.length, LONGER * setting.length))
    made.append(Panel(title="longer rows than those of training", x=next(axes), y=next(axes), lines=points))
    return made


def _curve(setting: Setting, row: Row) -> Line:
    curve = row["curve"]
    step = setting.steps * setting.step_tokens / len(curve)
    return Line(label=row["name"], x=[(i + 1) * step for i in range(len(curve))], y=[100 * y for y in curve])
