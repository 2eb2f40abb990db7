"""The command ``mnemosyne``: assembly only, one module a command."""

from __future__ import annotations

import typer

from mnemosyne.server.cli.ask import ask
from mnemosyne.server.cli.eval import app as evaluations
from mnemosyne.server.cli.ingest import ingest
from mnemosyne.server.cli.models import models
from mnemosyne.server.cli.serve import serve
from mnemosyne.server.cli.sessions import sessions
from mnemosyne.server.cli.surprise import surprise
from mnemosyne.server.cli.transfer import export_session, import_session

app = typer.Typer(
    name="mnemosyne",
    help="Serve Titans models whose sessions learn while they read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, models, ingest, ask, sessions, surprise):
    app.command()(command)
app.command(name="export")(export_session)
app.command(name="import")(import_session)
app.add_typer(evaluations, name="eval")
