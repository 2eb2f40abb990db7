"""A real server on a free port of 127.0.0.1, in a thread of the test's process. It stops by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx
import uvicorn

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.server.app import create_app
from mnemosyne.server.runtime import Runtime
from mnemosyne.server.settings import Settings

from .scripted import ScriptedModel, scripted_engine


class RunningServer:
    def __init__(
        self,
        checkpoint: Path,
        data_dir: Path,
        store: SessionStore | None = None,
        max_queued_tokens: int = 1 << 18,
        **settings: Any,
    ) -> None:
        self.model = ScriptedModel()
        self.settings = Settings.load(
            checkpoint=checkpoint, data_dir=data_dir, port=0, drain_seconds=5.0, **settings
        )
        self.store = store or DirectoryStore(data_dir)
        engine = scripted_engine(self.model, max_queued_tokens)
        app = create_app(self.settings, engine=engine, store=self.store)
        self.runtime = cast(Runtime, app.state.runtime)
        config = uvicorn.Config(app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        _until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)
        _until(lambda: self.runtime.phase != "loading")

    def stop(self) -> None:
        self.model.gate.set()
        self.http.close()
        self._server.should_exit = True
        self._thread.join(15)
        assert not self._thread.is_alive(), "the server didn't stop"

    def session(self, **body: Any) -> str:
        answer = self.http.post("/v1/sessions", json=body)
        assert answer.status_code == 201, answer.text
        return cast(str, answer.json()["id"])

    def document(self, session_id: str, text: str, **body: Any) -> dict[str, Any]:
        """Send a text and wait until it is absorbed."""
        url = f"/v1/sessions/{session_id}/documents"
        answer = self.http.post(url, json={"name": "text", "text": text, **body})
        assert answer.status_code == 201, answer.text
        return self.finished(session_id, answer.json()["id"])

    def finished(self, session_id: str, document_id: str) -> dict[str, Any]:
        url = f"/v1/sessions/{session_id}/documents/{document_id}"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            info = cast(dict[str, Any], self.http.get(url).json())
            if info["status"] not in ("receiving", "queued", "absorbing"):
                return info
            time.sleep(0.01)
        raise AssertionError(f"the document isn't finished: {info}")

    def gauge(self, name: str) -> float:
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"mnemosyne:{name}{{"):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def until(self, ready: Callable[[], bool]) -> None:
        _until(ready)

    def until_gauge(self, name: str, value: float) -> None:
        _until(lambda: self.gauge(name) == value)


def _until(ready: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
