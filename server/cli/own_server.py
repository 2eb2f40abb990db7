"""A server that a command starts for itself and ends with itself. Owns the process; knows no request.

It computes as the environment's settings say (device, precision, threads); its sessions live in a folder that
is thrown away, on a free port of 127.0.0.1, without keys.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mnemosyne.engine.errors import EngineUnavailable
from mnemosyne.server.cli.client import ApiError, Client

START_SECONDS = 180.0
STOP_SECONDS = 30.0
OTHERS = ("REDIS_URL", "KEYS_FILE", "CONFIG_FILE", "QUOTA_", "MODEL_NAME")
"""Settings of a server that others use, which this one doesn't take from the environment."""


@contextmanager
def own_server(checkpoint: Path, log: Path, device: str | None = None) -> Iterator[str]:
    """Where it listens, once it is ready; ``log`` gets what it writes. For the main thread: SIGTERM is an
    exception meanwhile, so that the server doesn't outlive the command.

    Raises EngineUnavailable with the log's end where it doesn't become ready.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    denied = tuple(f"MNEMOSYNE_{name}" for name in OTHERS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(denied)}
    with tempfile.TemporaryDirectory(prefix="mnemosyne-eval-") as data:
        command = [sys.executable, "-c", "from mnemosyne.server.cli.main import app; app()", "serve"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--data-dir", data]
        command += ["--checkpoint", str(checkpoint.resolve()), "--log-level", "warning"]
        command += ["--device", device] if device else []
        with log.open("ab") as out:
            # From the repository's root, the folders would be importable a second time.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=data
            )
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            _wait(process, url, log)
            yield url
        finally:
            signal.signal(signal.SIGTERM, before)
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    began = time.monotonic()
    with Client(url, timeout_seconds=5) as client:
        while True:
            try:
                client.call("GET", "/health/ready")
                return
            except ApiError:
                if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                    end = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                    raise EngineUnavailable(f"the server didn't start; {log} ends with:\n{end}") from None
                time.sleep(0.1)
