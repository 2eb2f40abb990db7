"""One sample of an evaluation through a server: a session reads it, is asked, and is erased. Owns the
requests and which failures are final; knows no benchmark and no terminal."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import BinaryIO, Protocol

from mnemosyne.engine.errors import ConfigError
from mnemosyne.server.cli.client import ApiError, Client

LONGEST_ANSWER = 32
"""Tokens."""
POLL_SECONDS = 0.02, 1.0
"""Between two looks at a document: the first wait, and the longest, reached by half of it more each time."""
FINAL = (400, 401, 403, 413, 415, 422)
"""Statuses that the same request gets again whenever it comes."""


class Text(Protocol):
    """As much of a sample as a server needs."""

    @property
    def question(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def open(self) -> BinaryIO: ...


def read_and_ask(client: Client, model: str, sample: Text, stopping: threading.Event) -> str:
    """The answer of a session of its own that has read the sample; any number of threads at once.

    Raises ApiError for a failure that may pass (also once ``stopping`` is set), and ConfigError for one that
    repeats itself: a status of ``FINAL``, or a server that counts other tokens.
    """
    session: str | None = None
    try:
        session = str(client.create_session(model=model)["id"])
        document = str(client.create_document(session, "sample", sample.nbytes)["id"])
        with sample.open() as text:
            client.upload(session, document, text, sample.nbytes)
        read = _absorbed(client, session, document, stopping)
        if read != sample.tokens:
            raise ConfigError(
                f"the server read {read} tokens where --checkpoint's tokenizer counts {sample.tokens}: the "
                "two don't belong together"
            )
        return client.ask(
            sample.question, session, model, learn=False, temperature=0, max_tokens=LONGEST_ANSWER
        ).text
    except ApiError as error:
        if error.status in FINAL:
            raise ConfigError(f"the server refuses a sample: {error.message}") from error
        raise
    finally:
        if session is not None:
            with suppress(ApiError):
                client.delete_session(session, erase=True)


def _absorbed(client: Client, session: str, document: str, stopping: threading.Event) -> int:
    """Tokens of the document, once all of it was read."""
    wait, longest = POLL_SECONDS
    while True:
        found = client.document(session, document)
        if found["status"] == "absorbed":
            return int(found["tokens_absorbed"])
        if found["status"] in ("rejected", "cancelled"):
            raise ApiError(0, found["status"], f"the document was {found['status']}: {found.get('error')}")
        if stopping.wait(wait):
            raise ApiError(0, "stopped", "the run was stopped")
        wait = min(longest, 1.5 * wait)


def check_tokenizer(client: Client, model: str, text: str, ids: list[int]) -> None:
    """Raises ConfigError where the server makes other ids of ``text``."""
    theirs = client.call("POST", "/tokenize", json={"model": model, "prompt": text}).json()["tokens"]
    if theirs != ids:
        raise ConfigError(
            f"--checkpoint's tokenizer isn't that of {model} at {client.url}: the same text has {len(ids)} "
            f"tokens here and {len(theirs)} there, or others. Name the folder that the server serves"
        )


def fingerprint(client: Client, model: str) -> str:
    """Of the model behind the server."""
    session = client.create_session(model=model)
    client.delete_session(str(session["id"]), erase=True)
    return str(session["fingerprint"])
