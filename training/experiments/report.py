"""What an experiment hands over, as JSON, and as Markdown between two marks of its page.

Knows no experiment and draws nothing (``figures`` does).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- generated -->", "<!-- end of generated -->"


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] | tuple[Sequence[float], Sequence[float]] | None = None
    """Half the width of the interval around each y, or what of it lies below and what above."""
    joined: bool = True
    """False: points."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    logarithmic: str = ""
    """Which axes: x, y or xy."""


@dataclass(frozen=True, kw_only=True)
class Result:
    name: str
    size: str
    setting: dict[str, Any]
    """The experiment's own numbers, printed above its tables."""
    machine: str
    """Device and torch version."""
    tables: Sequence[Table]
    panels: Sequence[Panel] = field(default_factory=list)


def save(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(dataclasses.asdict(result)), indent=1)
    (folder / f"{result.name}.json").write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Five digits are enough for a plot."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def load(path: Path) -> Result:
    given = json.loads(path.read_text(encoding="utf-8"))
    panels = [
        Panel(**{**panel, "lines": [Line(**line) for line in panel["lines"]]}) for panel in given["panels"]
    ]
    return Result(**{**given, "tables": [Table(**table) for table in given["tables"]], "panels": panels})


def markdown(result: Result) -> str:
    """Setting, tables and the figure's link; what the program prints, and what stands in the page."""
    setting = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in result.setting.items())
    command = f"python -m mnemosyne.training.experiments {result.name} --size {result.size}"
    parts = [f"`{command}` ({result.machine}): {setting}."]
    for table in result.tables:
        rows = [table.columns, ["---"] * len(table.columns), *table.rows]
        parts += [f"**{table.title}**", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    if result.panels:
        parts.append(f"![{result.name}]({result.name}.svg)")
    return "\n\n".join(parts)


def _plain(value: object) -> str:
    return " ".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)


def fill(page: Path, text: str) -> None:
    """Put ``text`` between the marks of ``page``; a page that isn't there, or has none, gets them at its
    end."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    before, rest = old.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
