"""Servers for the HTTP tests: one that a module shares, and a maker of others with settings of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import RedisServer

from .processes import Start, starter, write_tiny
from .running import RunningServer
from .scripted import write_checkpoint

MakeServer = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "scripted")


@pytest.fixture(scope="session")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny", tokenizer)


@pytest.fixture
def start(tiny: Path, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Start]:
    """Starts servers as processes, one after the other, on the same folder."""
    yield from starter(tiny, free_port(), {"DATA_DIR": tmp_path / "data"})


@pytest.fixture
def start_on_redis(tiny: Path, redis_server: RedisServer, free_port: Callable[[], int]) -> Iterator[Start]:
    """Starts servers as processes, one after the other, on the same Redis."""
    yield from starter(tiny, free_port(), {"REDIS_URL": redis_server.url})


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(checkpoint, tmp_path_factory.mktemp("data"))
    yield running
    running.stop()


@pytest.fixture
def make_server(checkpoint: Path, tmp_path: Path) -> Iterator[MakeServer]:
    made: list[RunningServer] = []

    def make(**settings: object) -> RunningServer:
        made.append(RunningServer(checkpoint, tmp_path / f"data-{len(made)}", **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for running in made:
        running.stop()
