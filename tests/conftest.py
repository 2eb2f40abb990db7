"""What all tests share: one torch thread, free ports, a real redis-server. Knows no module's insides."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported anywhere: on a busy machine two spinning threads are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that wait for a process in the background come last: then it has ended, or nearly."""
    items.sort(key=lambda item: item.get_closest_marker("interpreted") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    from tests.kernels.triton.interpreter import files_of, interpreter

    if not session.config.option.collectonly and importlib.util.find_spec("triton"):
        interpreter.begin(file for item in session.items for file in files_of(item))


def pytest_sessionfinish() -> None:
    from tests.kernels.triton.interpreter import interpreter

    interpreter.stop()


def unused_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """A real ``redis-server`` that syncs every write to its file; may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = unused_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Return once it answers; what an earlier process of this folder wrote is loaded."""
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.fail("redis-server is not installed; `make test` installs it, or says how")
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "logfile": str(self.folder / "redis.log"),
        }
        arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen([binary, *arguments], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("redis-server did not start:\n" + (self.folder / "redis.log").read_text())
            time.sleep(0.02)

    def kill(self) -> None:
        """``kill -9``, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that gives a free port at each call."""
    return unused_port


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running Redis of this test's own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()
