"""``kill -9`` at any moment: what was acknowledged is there, as in a run that was never killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.server.sessions.service import SessionService
from tests.server.sessions.harness import (
    TENANT,
    make_service,
    new_session,
    read_document,
    state,
    turn,
    until_ended,
)
from tests.server.sessions.worker import DOCUMENT

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("word", "delay"), [("uploaded", 0.2), ("asking 3", 0.02), ("answered 5", 0.0)])
async def test_what_was_acknowledged_survives(
    service: SessionService, engine: InlineEngine, tmp_path: Path, word: str, delay: float
) -> None:
    said = until_killed(tmp_path / "killed", word, delay)
    session_id = said[0].split()[1]
    acknowledged = max((int(line.split()[1]) for line in said if line.startswith("answered")), default=1)
    after = make_service(DirectoryStore(tmp_path / "killed"), engine)
    await after.start([TENANT])
    [document] = await after.documents(TENANT, session_id)
    assert (await until_ended(after, session_id, document.id)).status == "absorbed"
    version = (await after.get(TENANT, session_id)).version
    assert version >= max(2, acknowledged)
    undisturbed = await new_session(service)
    await read_document(service, undisturbed, DOCUMENT)
    for number in range(version - 2):
        await turn(service, undisturbed, f"Question {number}?", max_tokens=40)
    assert await state(after, session_id) == await state(service, undisturbed)
    await after.drain()


def until_killed(folder: Path, word: str, delay: float) -> list[str]:
    """What the worker said until it was killed, ``delay`` seconds after ``word``."""
    command = [sys.executable, "-m", "tests.server.sessions.worker", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        said = []
        for line in worker.stdout:
            said.append(line)
            if line.startswith(word):
                break
        time.sleep(delay)
        worker.kill()
        said += worker.stdout.readlines()
    assert word in "".join(said), "the worker ended by itself"
    return said
