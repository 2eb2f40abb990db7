"""Runs a file of tests where triton is told to interpret: in a process of its own, since triton decides when
it is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def passes_in_the_interpreter(file: Path) -> None:
    """Every test of ``file``, none of them skipped; without triton the caller is skipped."""
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    plugins = ["-p", "no:cacheprovider", "-p", "tests.kernels.triton.quick_interpreter"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugins, str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed", done.stdout, re.M), "nothing was run, or something was skipped"
    assert not re.search(r"^\d+ passed.*skipped", done.stdout, re.M), "something was skipped"
