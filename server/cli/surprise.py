"""``mnemosyne surprise``: where a text surprised its session's memory, as a line of bars and a table with the
text of what surprised most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mnemosyne.server.cli.client import ApiError, Client
from mnemosyne.server.cli.terminal import (
    URL_DEFAULT,
    Json,
    Key,
    Url,
    errors,
    failures_as_one_line,
    output,
    print_json,
    print_table,
)

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 80
"""Characters of the picture."""
ROWS = 8
"""Of the table: the points that surprised most."""
TEXT = 60
"""Characters of a point's text."""
COLUMNS = ("surprise", "momentary", "moved", "gain")
NUMBERS = ("from", "to", *COLUMNS)


def surprise(
    session: Annotated[str, typer.Argument(help="Id of the session.")],
    start: Annotated[int | None, typer.Option("--from", help="First token.")] = None,
    to: Annotated[int | None, typer.Option(help="Before this token.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Tokens a point; below a chunk: by token.")] = None,
    url: Url = URL_DEFAULT,
    key: Key = None,
    json: Json = False,
) -> None:
    """Show where a session's text surprised its memory."""
    params = {"from": start, "to": to, "resolution": resolution}
    with failures_as_one_line(), Client(url, key) as client:
        if json:
            print_json(client.surprise(session, **params))
            return
        found = _with_text(client, session, params)
        points = [point for point in found["points"] if point["surprise"] is not None]
        most = sorted(points, key=lambda point: -float(point["surprise"]))[:ROWS]
        texts = _texts(client, session, most)
    if not points:
        output.print(f"nothing is known of tokens {found['from']:,} to {found['to']:,}")
        return
    values = [point["surprise"] for point in points]
    first, last = points[0]["from"], points[-1]["to"]
    span = f"{min(values):.4g} to {max(values):.4g}"
    output.print(f"surprise of tokens {first:,} to {last:,}: {span}", highlight=False)
    output.print(sparkline(points, first, last), highlight=False)
    columns = (*NUMBERS, "text") if any(texts.values()) else NUMBERS
    rows = sorted(most, key=lambda point: int(point["from"]))
    print_table(
        columns,
        [[*_numbers(point), texts[point["from"]]][: len(columns)] for point in rows],
        "what surprised most",
        NUMBERS,
    )


def _with_text(client: Client, session: str, params: dict[str, Any]) -> dict[str, Any]:
    """The trace, with text where all of it is few enough tokens."""
    try:
        return client.surprise(session, **params, text="true")
    except ApiError as error:
        if error.status != 400:
            raise
        return client.surprise(session, **params)


def _texts(client: Client, session: str, points: Sequence[dict[str, Any]]) -> dict[int, str]:
    """How the text of each point begins, by its first token; empty where it can't be had, and why is said."""
    texts: dict[int, str] = {}
    why: set[str] = set()
    for point in points:
        text = point.get("text")
        if text is None:
            there = {"from": point["from"], "to": point["to"], "resolution": point["to"] - point["from"]}
            try:
                found = client.surprise(session, **there, text="true")["points"]
            except ApiError as error:
                found = []
                why.add(error.message)
            if found and found[0]["from"] == point["from"]:
                text = "".join(part.get("text") or "" for part in found)
        words = " ".join("".join(c if c.isprintable() else " " for c in text or "").split())
        texts[point["from"]] = words if len(words) <= TEXT else f"{words[: TEXT - 1]}…"
    for reason in sorted(why):
        errors.print(f"note: without text: {reason}", markup=False, highlight=False)
    return texts


def sparkline(points: Sequence[dict[str, Any]], first: int, last: int) -> str:
    """The largest surprise under each character, which stand for equally many tokens."""
    width = min(WIDTH, len(points))
    highest: list[float | None] = [None] * width
    for point in points:
        begin = (point["from"] - first) * width // (last - first)
        end = max(begin + 1, (point["to"] - first) * width // (last - first))
        for i in range(begin, min(end, width)):
            highest[i] = max(point["surprise"], highest[i] or 0.0)
    values = [point["surprise"] for point in points]
    least, most = min(values), max(values)
    step = (most - least) / (len(BARS) - 1) or 1.0
    return "".join(" " if value is None else BARS[round((value - least) / step)] for value in highest)


def _numbers(point: dict[str, Any]) -> list[str]:
    values = ("" if point[name] is None else f"{point[name]:.4g}" for name in COLUMNS)
    return [f"{point['from']:,}", f"{point['to']:,}", *values]
