"""``mnemosyne export`` and ``mnemosyne import``: a session's state as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnemosyne.server.cli.client import Client
from mnemosyne.server.cli.terminal import (
    URL_DEFAULT,
    Json,
    Key,
    Session,
    Url,
    failures_as_one_line,
    output,
    print_json,
)


def export_session(
    file: Annotated[Path, typer.Argument(dir_okay=False, help="Where to write the state.")],
    session: Session,
    log: Annotated[
        bool, typer.Option("--log", help="Put the log of everything read and said into it.")
    ] = False,
    url: Url = URL_DEFAULT,
    key: Key = None,
    json: Json = False,
) -> None:
    """Write a session's state to a file."""
    with failures_as_one_line(), Client(url, key) as client:
        size = client.export_state(session, file, log)
    if json:
        print_json({"session": session, "file": str(file), "bytes": size})
    else:
        output.print(f"wrote {size:,} bytes to {file}")


def import_session(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="An exported state.")
    ],
    session: Annotated[
        str | None, typer.Option("--session", "-s", help="Session that becomes it; a new one if not given.")
    ] = None,
    url: Url = URL_DEFAULT,
    key: Key = None,
    json: Json = False,
) -> None:
    """Make a session continue from an exported state; the same model must be served."""
    with failures_as_one_line(), Client(url, key) as client:
        state = client.import_state(session or str(client.create_session()["id"]), file)
    if json:
        print_json(state)
    else:
        output.print(
            f"session {state['id']} stands at {state['tokens_seen']} tokens, version {state['version']}"
        )
