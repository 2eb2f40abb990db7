"""``mnemosyne sessions``: the sessions that a server keeps for this key."""

from __future__ import annotations

from rich.table import Table

from mnemosyne.server.cli.client import Client
from mnemosyne.server.cli.terminal import (
    URL_DEFAULT,
    Json,
    Key,
    Url,
    failures_as_one_line,
    output,
    print_json,
)


def sessions(url: Url = URL_DEFAULT, key: Key = None, json: Json = False) -> None:
    """List the sessions, in the order in which they were made."""
    with failures_as_one_line(), Client(url, key) as client:
        found = list(client.sessions())
    if json:
        print_json(found)
        return
    table = Table()
    # Whole, for it is what the other commands are given.
    table.add_column("session", no_wrap=True, min_width=len(found[0]["id"]) if found else None)
    for title in ("model", "version", "tokens seen", "state (MB)", "tier"):
        table.add_column(title)
    for session in found:
        table.add_row(
            session["id"],
            session["model"],
            str(session["version"]),
            f"{session['tokens_seen']:,}",
            f"{session['state_bytes'] / 1e6:.1f}",
            str(session.get("tier", "")),
        )
    output.print(table)
