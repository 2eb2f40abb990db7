"""The command ``mnemosyne``: assembly only, one module a command."""

from __future__ import annotations

from typing import Annotated

import typer

from mnemosyne.server.cli.ask import ask
from mnemosyne.server.cli.eval import app as evaluations
from mnemosyne.server.cli.ingest import ingest
from mnemosyne.server.cli.models import models
from mnemosyne.server.cli.serve import serve
from mnemosyne.server.cli.sessions import sessions
from mnemosyne.server.cli.surprise import surprise
from mnemosyne.server.cli.transfer import export_session, import_session
from mnemosyne.server.package import package_version

app = typer.Typer(
    name="mnemosyne",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, models, ingest, ask, sessions, surprise):
    app.command()(command)
app.command(name="export")(export_session)
app.command(name="import")(import_session)
app.add_typer(evaluations, name="eval")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(package_version())
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve Titans models whose sessions learn while they read."""
