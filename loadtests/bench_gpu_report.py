"""Lines of the GPU bench's table: a number beside its limit, its aim and the least it should be. Knows no
measurement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Line:
    what: str
    value: float | None
    """None: there is no number, and ``why`` says why."""
    form: str = "{:,.0f}"
    limit: float | None = None
    """In the unit of the value."""
    limit_is: str = ""
    """How the limit came, in numbers."""
    least: float | None = None
    aim: float | None = None
    least_share: float | None = None
    """Of the limit, as ``aim_share``."""
    aim_share: float | None = None
    at_most: bool = False
    """The value should be no more than ``least`` and ``aim``, not no less."""
    why: str = ""
    failed: bool = False
    """Something went wrong; otherwise a line without a number was left out for a reason."""

    @property
    def share(self) -> float | None:
        return None if self.value is None or not self.limit else self.value / self.limit

    @property
    def verdict(self) -> str:
        """``aim``, ``least``, ``missed``, or empty where nothing is asked for."""
        for name, bound, share in (
            ("aim", self.aim, self.aim_share),
            ("least", self.least, self.least_share),
        ):
            if self._reaches(bound, share):
                return name
        return "missed" if self._asked and self.value is not None else ""

    @property
    def _asked(self) -> bool:
        return any(x is not None for x in (self.least, self.aim, self.least_share, self.aim_share))

    def _reaches(self, bound: float | None, share: float | None) -> bool:
        if self.value is None:
            return False
        if share is not None:
            return self.share is not None and self.share >= share
        if bound is None:
            return False
        return self.value <= bound if self.at_most else self.value >= bound

    def without_aims(self) -> Line:
        return replace(self, least=None, aim=None, least_share=None, aim_share=None)

    def asked(self, bound: float | None, share: float | None) -> str:
        if share is not None:
            return f"{share:.0%} of limit"
        return "" if bound is None else ("≤ " if self.at_most else "≥ ") + self.form.format(bound)

    def facts(self) -> dict[str, Any]:
        """For JSON, without what isn't there."""
        given = asdict(self) | {"share": self.share, "verdict": self.verdict}
        return {name: value for name, value in given.items() if value is not None and value != ""}


MOST_CHARACTERS = 400


def failed(what: str, error: BaseException) -> Line:
    """With the end of what it says, where the cause stands."""
    said = " ".join(str(error).split())
    if len(said) > MOST_CHARACTERS:
        said = f"... {said[-MOST_CHARACTERS:]}"
    return Line(what, None, why=f"{type(error).__name__}: {said}", failed=True)


def left_out(what: str, why: str) -> Line:
    return Line(what, None, why=why)


def table_of(title: str, lines: list[Line]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "measured", "limit", "of it", "least", "aim", "reached", "the limit is"):
        table.add_column(name, justify="left" if name in ("", "reached", "the limit is") else "right")
    colours = {"aim": "[green]aim[/green]", "least": "[yellow]least[/yellow]", "missed": "[red]missed[/red]"}
    for line in lines:
        if line.value is None:
            colour = "red" if line.failed else "dim"
            table.add_row(line.what, "-", *[""] * 5, f"[{colour}]{_plain(line.why)}[/{colour}]")
            continue
        table.add_row(
            line.what,
            line.form.format(line.value),
            "" if line.limit is None else line.form.format(line.limit),
            "" if line.share is None else f"{line.share:.1%}",
            line.asked(line.least, line.least_share),
            line.asked(line.aim, line.aim_share),
            colours.get(line.verdict, ""),
            line.limit_is or line.why,
        )
    return table


def _plain(text: str) -> str:
    """What an error says must not be taken for markup."""
    return text.replace("[", "\\[")
