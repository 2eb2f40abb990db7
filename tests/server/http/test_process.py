"""The server as a process of its own with its engine's: it starts, drains on SIGTERM, and comes back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .processes import Process, Start


def ask(process: Process, session_id: str, tokens: int = 12) -> str:
    body = {"prompt": "?", "max_tokens": tokens, "temperature": 0, "session_id": session_id, "learn": False}
    answer = process.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_sigterm_lets_an_answer_end_and_the_session_comes_back(start: Start) -> None:
    server = start().ready()
    session_id = server.http.post("/v1/sessions").json()["id"]
    text = {"name": "text", "text": "something to remember, " * 20}
    server.http.post(f"/v1/sessions/{session_id}/documents", json=text)
    while server.http.get(f"/v1/sessions/{session_id}").json()["tokens_seen"] != 460:
        time.sleep(0.05)

    body = {"prompt": "go", "max_tokens": 400, "temperature": 0, "session_id": session_id, "stream": True}
    lines: list[str] = []
    began = threading.Event()

    def read() -> None:
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(30)
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (ready := server.http.get("/health/ready")).status_code != 503 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ready.json()["status"] == "shutting_down"
    reader.join(60)
    assert server.process.wait(30) == 0
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert not any('"error"' in line for line in lines)

    again = start().ready()
    info = again.http.get(f"/v1/sessions/{session_id}").json()
    assert info["tokens_seen"] == 460 + 2 + 400
    first = ask(again, session_id)
    again.process.kill()
    again.process.wait()
    assert ask(start().ready(), session_id) == first


def test_a_checkpoint_that_cannot_be_served_ends_the_process_with_one_line(
    tiny: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    wrong = shutil.copytree(tiny, tmp_path / "wrong")
    (wrong / "model.safetensors").write_bytes(b"not weights")
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "prompt.json").unlink()
    for folder, reason in ((wrong, "model.safetensors"), (broken, "prompt.json")):
        environment = {
            "MNEMOSYNE_CHECKPOINT": str(folder),
            "MNEMOSYNE_DATA_DIR": str(tmp_path / "data"),
            "MNEMOSYNE_PORT": str(free_port()),
        }
        done = subprocess.run(
            [sys.executable, "-m", "mnemosyne.server"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert reason in done.stderr and "Traceback" not in done.stderr
