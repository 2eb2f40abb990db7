"""How the commands speak: tables for people, JSON for scripts, one line for an error. Knows no route."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.server.cli.client import DEFAULT_URL, ApiError

output = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)
tables = Console(width=1000)
"""Wider than any row, so that none is cut: where it doesn't fit, the terminal wraps it."""

Url = Annotated[str, typer.Option(envvar="MNEMOSYNE_URL", help="Where the server listens.")]
Key = Annotated[
    str | None, typer.Option(envvar="MNEMOSYNE_API_KEY", help="API key, where the server asks for one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Session = Annotated[str, typer.Option("--session", "-s", help="Id of the session.")]
URL_DEFAULT = DEFAULT_URL


@contextmanager
def failures_as_one_line() -> Iterator[None]:
    """End the process with status 1 and the message instead of a traceback."""
    try:
        yield
    except (ApiError, MnemosyneError, OSError) as error:
        code = f" ({error.code})" if isinstance(error, ApiError) and error.code else ""
        errors.print(f"[red]error[/red]{code}: ", end="")
        errors.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from error


def print_json(value: Any) -> None:
    """One JSON document on standard output, on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    numbers: Sequence[str] = (),
) -> None:
    """A table on standard output, a row to a line, nothing of it cut; the columns ``numbers`` stand on the
    right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    if title is not None:
        tables.print(title, markup=False, highlight=False)
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in numbers else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    tables.print(table)


def reading_progress() -> Progress:
    """A bar that counts bytes, on standard error so that standard output stays the answer's."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=errors, transient=True)
