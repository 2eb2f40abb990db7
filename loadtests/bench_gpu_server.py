"""The HTTP bench's requests made of a server: many streams, and a session that reads beside them. Knows no
engine and no table.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bench_gpu_streams import Asked, Measured, Sample
from bench_reading import read

from mnemosyne.server.cli.client import ApiError, Client

STREAMS = 32
"""Of one client's process."""
ENDED = ("absorbed", "rejected", "cancelled")


class BesideReading:
    """A session that reads a text again and again until it is told to stop; a failure of it is kept."""

    def __init__(self, url: str, text: str) -> None:
        self._client = Client(url)
        self.session = str(self._client.create_session()["id"])
        self._text, self._stopped = text, False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stopped:
            try:
                read(self._client, self.session, self._text)
            except ApiError as error:
                if not self._stopped:
                    self._failure = error
                return

    def seen(self) -> int:
        """Tokens that it has read, of the document under way too. Raises ApiError with what stopped it."""
        if self._failure is not None:
            raise self._failure
        with Client(self._client.url) as client:
            documents = client.call("GET", f"/v1/sessions/{self.session}/documents").json()["data"]
        return sum(int(document["tokens_absorbed"]) for document in documents)

    def start(self) -> None:
        """Return once it reads."""
        self._thread.start()
        while not self.seen():
            time.sleep(0.02)

    def stop(self) -> None:
        self._stopped = True
        with Client(self._client.url) as client, suppress(ApiError):
            client.delete_session(self.session, erase=True)
        self._thread.join()
        self._client.close()


def measure_server(
    url: str, asked: Asked, vocab: int, token: int, streams: int, text: str | None
) -> Measured:
    """As ``bench_gpu_engine.measure_engine``; with ``text`` a session reads it beside the streams. Raises
    ApiError, and RuntimeError with what a client's process said."""
    rng = random.Random(streams)
    with Client(url) as client:
        sessions = [_session(client, rng.choices(range(vocab), k=asked.context)) for _ in range(streams)]
        for session, document in sessions:
            _wait(client, session, document)
        todo = {
            "url": url,
            "prompt": rng.choices(range(vocab), k=asked.prompt),
            "answer": asked.answer,
            "token": token,
            "rounds": asked.rounds,
        }
        names = [session for session, _ in sessions]
        samples: list[Sample] = []
        with _clients(todo, names) as processes:
            beside = None if text is None else BesideReading(url, text)
            try:
                if beside is not None:
                    beside.start()
                before, began = beside.seen() if beside else 0, time.perf_counter()
                for process in processes:
                    _say(process, "go")
                for process in processes:
                    samples += [(first, between) for first, between in json.loads(_hear(process))]
                spent = time.perf_counter() - began
                speed = (beside.seen() - before) / spent if beside else 0.0
            finally:
                if beside is not None:
                    beside.stop()
        for name in names:
            client.delete_session(name, erase=True)
    return Measured(streams, text is not None, samples, speed)


def _session(client: Client, ids: list[int]) -> tuple[str, str]:
    """A session that is going to have read ``ids``, and the document that it reads."""
    session = str(client.create_session()["id"])
    body = {"name": "context", "tokens": ids}
    document = client.call("POST", f"/v1/sessions/{session}/documents", json=body).json()
    return session, str(document["id"])


def _wait(client: Client, session: str, document: str) -> None:
    while (status := client.document(session, document)["status"]) not in ENDED:
        time.sleep(0.02)
    if status != "absorbed":
        raise ApiError(0, status, f"the context of {session} was {status}")


@contextmanager
def _clients(todo: dict[str, Any], sessions: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have each had one round of answers, and wait."""
    script = str(Path(__file__).with_name("bench_gpu_client.py"))
    groups = [sessions[i : i + STREAMS] for i in range(0, len(sessions), STREAMS)]
    processes = [
        subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in groups
    ]
    try:
        for process, group in zip(processes, groups, strict=True):
            _say(process, json.dumps(todo | {"sessions": group}))
        for process in processes:
            _hear(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _say(process: subprocess.Popen[str], line: str) -> None:
    stream: IO[str] | None = process.stdin
    assert stream is not None
    stream.write(line + "\n")
    stream.flush()


def _hear(process: subprocess.Popen[str]) -> str:
    """Its next line. Raises RuntimeError where it ended instead; what it said of that stands above."""
    stream: IO[str] | None = process.stdout
    assert stream is not None
    line = stream.readline()
    if not line:
        raise RuntimeError(f"a client's process ended with status {process.wait()}")
    return line
