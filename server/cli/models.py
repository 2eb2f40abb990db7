"""``mnemosyne models``: what a server serves."""

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


def models(url: Url = URL_DEFAULT, key: Key = None, json: Json = False) -> None:
    """List the models that the server serves."""
    with failures_as_one_line(), Client(url, key) as client:
        found = client.models()
    if json:
        print_json(found)
        return
    rows = ((model["id"], str(model.get("root", "")), str(model.get("max_model_len", ""))) for model in found)
    print_table(("model", "root", "longest request (tokens)"), rows)
