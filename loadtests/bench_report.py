"""Rows of the bench's table, and what a failed check is. Knows no measurement."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table


class CheckFailed(Exception):
    """A result was wrong, so its speed means nothing."""


@dataclass(frozen=True)
class Row:
    what: str
    value: str
    aim: str = ""
    met: bool | None = None
    """None: there is no aim."""


def row(what: str, value: float, form: str, aim: float | None = None, at_most: bool = False) -> Row:
    """A number, formatted by ``form``, against the least (or the most) that it should be."""
    if aim is None:
        return Row(what, form.format(value))
    met = value <= aim if at_most else value >= aim
    return Row(what, form.format(value), ("≤ " if at_most else "≥ ") + form.format(aim), met)


def table_of(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "measured", "aim", ""):
        table.add_column(name, justify="right" if name in ("measured", "aim") else "left")
    marks = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}
    for each in rows:
        table.add_row(each.what, each.value, each.aim, marks[each.met])
    return table
