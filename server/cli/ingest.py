"""``mnemosyne ingest``: upload files into a session and watch them being read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TaskID

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
    reading_progress,
)

_OPEN = ("receiving", "queued", "absorbing")
_POLL_SECONDS = 0.5


def wait_until_read(
    client: Client, session_id: str, document_id: str, progress: Progress, task: TaskID
) -> dict[str, Any]:
    """Follow a document until it is absorbed. Raises ApiError when it was rejected or cancelled."""
    while True:
        document = client.document(session_id, document_id)
        progress.update(task, completed=document["bytes_absorbed"])
        if document["status"] == "absorbed":
            return document
        if document["status"] not in _OPEN:
            raise ApiError(0, document["status"], f"document {document_id}: {document.get('error')}")
        time.sleep(_POLL_SECONDS)


def ingest(
    files: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, readable=True, help="UTF-8 text.")
    ],
    session: Annotated[
        str | None, typer.Option("--session", "-s", help="Id of the session; a new one if not given.")
    ] = None,
    url: Url = URL_DEFAULT,
    key: Key = None,
    json: Json = False,
) -> None:
    """Let a session read files, in the order given."""
    read: list[dict[str, Any]] = []
    with failures_as_one_line(), Client(url, key) as client, reading_progress() as progress:
        new = session is None
        if session is None:
            session = str(client.create_session()["id"])
            errors.print(f"new session {session}", highlight=False)
        try:
            for file in files:
                read.append(_ingest(client, session, file, progress))
        except ApiError:
            if new and not read:
                client.delete_session(session, erase=True)
                errors.print(f"session {session} has read nothing and is deleted", highlight=False)
            raise
        state = client.session(session)
    if json:
        print_json({"session": state, "documents": read})
    else:
        output.print(f"session {session} has read {state['tokens_seen']} tokens, version {state['version']}")


def _ingest(client: Client, session: str, file: Path, progress: Progress) -> dict[str, Any]:
    """The document, once it is absorbed. Raises as ``wait_until_read``."""
    length = file.stat().st_size
    task = progress.add_task(file.name, total=length)
    document = client.create_document(session, file.name, length)
    with file.open("rb") as source:
        client.upload(session, document["id"], source, length)
    return wait_until_read(client, session, document["id"], progress, task)
