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
    with failures_as_one_line(), Client(url, key) as client:
        found = client.surprise(session, **{"from": start, "to": to, "resolution": resolution})
        points = [point for point in found["points"] if point["surprise"] is not None]
        most = sorted(points, key=lambda point: -float(point["surprise"]))[:ROWS]
        texts = {} if json else texts_of(client, session, most)
    if json:
        print_json(found)
        return
    if not points:
        output.print(f"nothing is known of tokens {found['from']:,} to {found['to']:,}")
        return
    values = [point["surprise"] for point in points]
    first, last = points[0]["from"], points[-1]["to"]
    span = f"{min(values):.4g} to {max(values):.4g}"
    output.print(f"surprise of tokens {first:,} to {last:,}: {span}", highlight=False)
    output.print(sparkline(points, first, last), highlight=False)
    rows = sorted(most, key=lambda point: int(point["from"]))
    print_table(
        (*NUMBERS, *(["text"] if texts else [])),
        [_row(point) + ([texts[point["from"]]] if texts else []) for point in rows],
        "what surprised most",
        NUMBERS,
    )


def texts_of(client: Client, session: str, points: Sequence[dict[str, Any]]) -> dict[int, str]:
    """How the text of each point begins, by its first token; nothing, and why is said, where the session's
    input can't be had."""
    texts: dict[int, str] = {}
    try:
        for point in points:
            size = point["to"] - point["from"]
            there = {"from": point["from"], "to": point["to"], "resolution": size, "text": "true"}
            found = client.surprise(session, **there)["points"]
            text = " ".join("".join(part["text"] for part in found).split())
            texts[point["from"]] = text if len(text) <= TEXT else f"{text[: TEXT - 1]}…"
    except ApiError as error:
        if error.status != 400:
            raise
        errors.print(f"note: without text: {error.message}", markup=False, highlight=False)
        return {}
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


def _row(point: dict[str, Any]) -> list[str]:
    values = ("" if point[name] is None else f"{point[name]:.4g}" for name in COLUMNS)
    return [f"{point['from']:,}", f"{point['to']:,}", *values]
