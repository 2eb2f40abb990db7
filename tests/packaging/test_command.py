"""The command ``mnemosyne`` from outside: help without torch, one line for an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

COMMANDS = ("serve", "models", "ingest", "ask", "sessions", "export", "import", "eval")


def mnemosyne(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mnemosyne.server.cli.main import app; app()", *arguments]
    environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, env=environment)


def test_help_names_every_command(tmp_path: Path) -> None:
    done = mnemosyne("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f" {command} " in done.stdout


def test_the_version_is_the_package_s(tmp_path: Path) -> None:
    assert mnemosyne("--version", cwd=tmp_path).stdout.strip() == version("mnemosyne")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, tmp_path: Path) -> None:
    done = mnemosyne(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_client_command_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, mnemosyne.server.cli.main; print('torch' in sys.modules, 'fastapi' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_no_server_is_one_line_and_status_1(tmp_path: Path, free_port: Callable[[], int]) -> None:
    done = mnemosyne("models", "--url", f"http://127.0.0.1:{free_port()}", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no answer from http://127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_setting_is_one_line_and_status_1(tmp_path: Path) -> None:
    done = mnemosyne("serve", "--device", "abacus", cwd=tmp_path)
    assert done.returncode == 1
    assert "device" in done.stderr
    assert "Traceback" not in done.stderr
