"""The server of the demo and the benches as a real process that can be killed. Knows no question."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mnemosyne.server.cli.client import ApiError, Client

START_SECONDS = 90.0


class ServerProcess:
    """``mnemosyne serve`` over one data directory, on a port of 127.0.0.1, in a process group of its own."""

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self._options = options
        self.data_dir = folder / "data"
        self.log = folder / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Return the seconds until it was ready; RuntimeError where it doesn't become so."""
        command = [sys.executable, "-c", "from mnemosyne.server.cli.main import app; app()", "serve"]
        command += ["--port", str(self.port), "--data-dir", str(self.data_dir), "--log-level", "warning"]
        command += self._options
        began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # From the repository's root, the folders would be importable a second time.
                cwd=self.log.parent,
            )
        with Client(self.url, timeout_seconds=5) as client:
            while not _ready(client):
                if self.process.poll() is not None or time.monotonic() - began > START_SECONDS:
                    raise RuntimeError("the server did not become ready")
                time.sleep(0.1)
        return time.monotonic() - began

    def kill(self, grace_seconds: float = 10.0) -> bool:
        """``kill -9`` the server alone; whether every process that it had started is then gone by itself."""
        if self.process is None:
            return True
        group = self.process.pid
        self.process.kill()
        self.process.wait()
        self.process = None
        deadline = time.monotonic() + grace_seconds
        while _group_lives(group):
            if time.monotonic() > deadline:
                os.killpg(group, signal.SIGKILL)
                return False
            time.sleep(0.05)
        return True

    def log_end(self, lines: int = 30) -> str:
        return (
            "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""
        )


def _ready(client: Client) -> bool:
    try:
        client.call("GET", "/health/ready")
    except ApiError:
        return False
    return True


def _group_lives(group: int) -> bool:
    """Whether a process of the group runs; on Linux a dead one that init hasn't reaped doesn't count."""
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        return True
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state not in "ZX":
            return True
    return False
