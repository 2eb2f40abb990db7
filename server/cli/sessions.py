"""``mnemosyne sessions``: the sessions that a server keeps for this key."""

from __future__ import annotations

from mnemosyne.server.cli.client import Client
from mnemosyne.server.cli.terminal import (
    URL_DEFAULT,
    Json,
    Key,
    Url,
    failures_as_one_line,
    print_json,
    print_table,
)


def sessions(url: Url = URL_DEFAULT, key: Key = None, json: Json = False) -> None:
    """List the sessions, in the order in which they were made."""
    with failures_as_one_line(), Client(url, key) as client:
        found = list(client.sessions())
    if json:
        print_json(found)
        return
    columns = ("session", "model", "version", "tokens", "MB", "tier")
    rows = (
        (
            session["id"],
            session["model"],
            str(session["version"]),
            f"{session['tokens_seen']:,}",
            f"{session['state_bytes'] / 1e6:.1f}",
            str(session.get("tier", "")),
        )
        for session in found
    )
    print_table(columns, rows)
