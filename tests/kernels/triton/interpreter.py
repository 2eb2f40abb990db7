"""Runs a file of tests where triton is told to interpret: in a process of its own, since triton decides when
it is imported.

Each takes long on one core, while the other tests often wait. So the files of all tests that are selected
(marked ``interpreted``) run in the background from the start, one after the other, and a test, after all
others, waits for its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[3]


class Ended(NamedTuple):
    status: int
    said: str
    errors: str


class Interpreter:
    """One process at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._begun: dict[Path, Future[Ended]] = {}
        self._running: subprocess.Popen[str] | None = None

    def begin(self, files: Iterable[Path]) -> None:
        for file in files:
            if file not in self._begun:
                self._begun[file] = self._pool.submit(self._run, file)

    def ended(self, file: Path) -> Ended:
        self.begin([file])
        return self._begun[file].result()

    def stop(self) -> None:
        """What nobody waits for any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._running is not None:
            self._running.terminate()

    def _run(self, file: Path) -> Ended:
        plugins = ["-p", "no:cacheprovider", "-p", "tests.kernels.triton.quick_interpreter"]
        command = [sys.executable, "-m", "pytest", "-q", "-x", *plugins, str(file)]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True
        ) as self._running:
            said, errors = self._running.communicate()
            return Ended(self._running.returncode, said, errors)


interpreter = Interpreter()


def files_of(item: pytest.Item) -> list[Path]:
    """That stand beside a test and that it names: ``@pytest.mark.interpreted(NAME)``."""
    return [item.path.with_name(mark.args[0]) for mark in item.iter_markers("interpreted")]


def passes_in_the_interpreter(item: pytest.Item) -> None:
    """Every test of the file that ``item`` names, none of them skipped; without triton it is skipped."""
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    (file,) = files_of(item)
    done = interpreter.ended(file)
    assert done.status == 0, done.said[-8000:] + done.errors[-2000:]
    assert re.search(r"^\d+ passed", done.said, re.M), "nothing was run, or something was skipped"
    assert not re.search(r"^\d+ passed.*skipped", done.said, re.M), "something was skipped"
