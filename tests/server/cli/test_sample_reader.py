"""One sample through a real server: what it read is counted, what is final is told apart, nothing stays."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from mnemosyne.engine.errors import ConfigError
from mnemosyne.server.cli.client import ApiError, Client
from mnemosyne.server.cli.sample_reader import read_and_ask
from tests.server.http.running import RunningServer
from tests.server.http.scripted import write_checkpoint


@dataclass(frozen=True)
class Text:
    data: bytes
    tokens: int
    question: str = "Which colour?"

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.data)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("reader")
    made = RunningServer(write_checkpoint(folder / "scripted"), folder / "data", max_document_bytes=1_000_000)
    yield made
    made.stop()


@pytest.fixture
def server(running: RunningServer) -> RunningServer:
    running.model.broken = False
    return running


def read(server: RunningServer, text: Text, stopping: threading.Event | None = None) -> str:
    with Client(server.url) as client:
        try:
            return read_and_ask(client, "scripted", text, stopping or threading.Event())
        finally:
            assert list(client.sessions()) == []


def test_it_reads_all_and_answers(server: RunningServer) -> None:
    assert read(server, Text(b"a" * 30_000, 30_000)).strip() == "blue"


def test_another_count_of_tokens_is_final(server: RunningServer) -> None:
    with pytest.raises(ConfigError, match="read 300 tokens where --checkpoint's tokenizer counts 299"):
        read(server, Text(b"a" * 300, 299))


def test_what_is_refused_each_time_is_final(server: RunningServer) -> None:
    with pytest.raises(ConfigError, match="the server refuses a sample: .*1000000"):
        read(server, Text(b"a" * 1_000_001, 1_000_001))


def test_what_may_pass_is_not(server: RunningServer) -> None:
    server.model.broken = True
    with pytest.raises(ApiError, match="was rejected"):
        read(server, Text(b"a" * 300, 300))


def test_a_run_that_is_stopped_waits_no_longer(server: RunningServer) -> None:
    server.model.gate.clear()
    stopping = threading.Event()
    threading.Timer(0.3, stopping.set).start()
    threading.Timer(2.0, server.model.gate.set).start()
    began = time.monotonic()
    with Client(server.url) as client, pytest.raises(ApiError, match="stopped"):
        read_and_ask(client, "scripted", Text(b"a" * 300, 300), stopping)
    assert time.monotonic() - began < 10
