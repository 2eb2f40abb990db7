"""A real server as a process of its own, over a real model that is tiny: to be killed and started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from mnemosyne.checkpoints.weights import save_checkpoint
from mnemosyne.engine.config import ModelConfig
from tests.engine.models import small_model

from .scripted import PROMPT

CONFIG = ModelConfig(
    variant="mag", layers=1, dim=32, head_dim=16, vocab_size=256, chunk=16, segment=48, window=32
)


def write_tiny(folder: Path, tokenizer: str) -> Path:
    """A checkpoint of random weights, whose token ids are bytes and whose memory changes as it reads."""
    torch.manual_seed(3)
    save_checkpoint(folder, CONFIG, small_model(CONFIG).state_dict(), tokenizer, {**PROMPT, "stop": []})
    return folder


class Process:
    def __init__(self, checkpoint: Path, port: int, **settings: object) -> None:
        known = {"THREADS": 1, "DTYPE": "float32", "DRAIN_SECONDS": 30, "LOG_LEVEL": "error"}
        settings = {**known, "CHECKPOINT": checkpoint, "PORT": port, **settings}
        environment = {f"MNEMOSYNE_{name}": str(value) for name, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mnemosyne.server"], env={**os.environ, **environment}
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    def ready(self) -> Process:
        def answers() -> bool:
            assert self.process.poll() is None, f"the server ended with {self.process.poll()}"
            try:
                return self.http.get("/health/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(answers, 60)
        return self

    def kill(self) -> None:
        """``kill -9``, as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.http.close()
        self.kill()

    def session(self) -> str:
        return str(self.post("/v1/sessions").json()["id"])

    def read(self, session_id: str, text: str) -> None:
        """Send a document whole and wait until it is read."""
        made = self.post(f"/v1/sessions/{session_id}/documents", name="text", text=text).json()
        self.absorbed(f"/v1/sessions/{session_id}/documents/{made['id']}")

    def absorbed(self, url: str) -> None:
        until(lambda: self.http.get(url).json()["status"] not in ("queued", "absorbing"), 60)
        assert self.http.get(url).json()["status"] == "absorbed"

    def ask(
        self, session_id: str, prompt: str | list[int], tokens: int = 24, **fields: Any
    ) -> dict[str, Any]:
        """A turn, sampled under a fixed seed, so that a wrong state or position shows."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 1, "seed": 11, "logprobs": 0}
        answer = self.post("/v1/completions", session_id=session_id, **{**body, **fields}).json()
        logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
        return {"text": answer["choices"][0]["text"], "logprobs": logprobs, "session": answer["session"]}

    def post(self, url: str, **body: Any) -> httpx.Response:
        answer = self.http.post(url, json=body)
        assert answer.is_success, answer.text
        return answer

    def state(self, session_id: str) -> bytes:
        """The state as a file: equal states, equal bytes."""
        answer = self.http.get(f"/v1/sessions/{session_id}/state")
        assert answer.status_code == 200, answer.text
        return answer.content


Start = Callable[..., Process]


def starter(checkpoint: Path, port: int, settings: dict[str, object]) -> Iterator[Start]:
    """What starts servers of the same settings, one after the other, and ends them at last."""
    started: list[Process] = []

    def start() -> Process:
        started.append(Process(checkpoint, port, **settings))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def until(ready: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
