"""``mnemosyne ask``: one question to a session, answered as it is generated."""

from __future__ import annotations

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
    print_json,
)


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    session: Session,
    learn: Annotated[bool, typer.Option(help="Whether the session remembers question and answer.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    url: Url = URL_DEFAULT,
    key: Key = None,
    json: Json = False,
) -> None:
    """Ask a session about what it has read."""
    with failures_as_one_line(), Client(url, key) as client:
        answer = client.ask(
            question,
            session,
            on_text=None if json else lambda text: typer.echo(text, nl=False),
            learn=learn,
            temperature=temperature,
            max_tokens=max_tokens,
        )
    if json:
        print_json(
            {
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "usage": answer.usage,
                "session": answer.session,
            }
        )
    else:
        typer.echo()
        if not answer.text:
            typer.echo("(an empty answer)", err=True)
