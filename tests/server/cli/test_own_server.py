"""The server that a command starts for itself ends with the command, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mnemosyne.server.cli.client import ApiError, Client
from mnemosyne.server.settings import shipped_checkpoint

COMMAND = """
import sys, time
from pathlib import Path
from mnemosyne.server.cli.own_server import own_server
with own_server(Path(sys.argv[1]), Path(sys.argv[2])) as url:
    print(url, flush=True)
    time.sleep(60)
"""


def test_a_command_that_is_terminated_takes_its_server_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("MNEMOSYNE_THREADS", "1")
    (tmp_path / "tmp").mkdir()
    arguments = [str(shipped_checkpoint()), str(tmp_path / "log")]
    command = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    with command:
        assert command.stdout is not None
        url = command.stdout.readline().strip()
        with Client(url) as client:
            assert client.models()
            command.send_signal(signal.SIGTERM)
            assert command.wait(30) == 128 + signal.SIGTERM
            with pytest.raises(ApiError):
                client.models()
    assert list((tmp_path / "tmp").iterdir()) == []
