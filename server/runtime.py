"""What a server process consists of while it runs. Owns the order of starting and draining; knows no route.

Starting happens beside listening, so that the health routes answer while the model loads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Literal

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import EngineUnavailable, MnemosyneError
from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import EngineInfo
from mnemosyne.server.auth import KeyRing
from mnemosyne.server.errors import Draining
from mnemosyne.server.metrics import Metrics
from mnemosyne.server.prompt import ChatTemplate
from mnemosyne.server.quotas import TenantLimits, TokenRate
from mnemosyne.server.sessions.service import ServiceSettings, SessionService
from mnemosyne.server.sessions.tokens import TextTokenizer
from mnemosyne.server.settings import Settings

log = logging.getLogger("mnemosyne.server")
Phase = Literal["loading", "ready", "draining", "failed"]


class Runtime:
    """One server's parts and the phase it is in. Raises ConfigError when made from settings that can't
    work."""

    def __init__(self, settings: Settings, engine: EngineLike, store: SessionStore) -> None:
        self.settings, self.engine, self.store = settings, engine, store
        self.phase: Phase = "loading"
        self.failure: MnemosyneError | None = None
        self.started_at = int(time.time())
        self.keys = KeyRing(settings.keys_file)
        self.metrics = Metrics(settings.served_model)
        self.rate = TokenRate(settings.quota_tokens_per_minute)
        self.limits = TenantLimits(store, settings.quota_sessions, settings.quota_stored_bytes)
        self.tokenizer = TextTokenizer.from_file(settings.checkpoint / "tokenizer.json")
        self.template = ChatTemplate.from_file(settings.checkpoint / "prompt.json")
        self.on_failed: Callable[[], None] = lambda: None
        self.in_flight = 0
        self._service: SessionService | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def service(self) -> SessionService:
        """The session service. Raises EngineUnavailable while loading, Draining while draining."""
        if self.phase == "draining":
            raise Draining("this server is shutting down", retry_after=5)
        if self.phase != "ready" or self._service is None:
            raise self.failure or EngineUnavailable(
                "the model is being loaded", code="loading", retry_after=5
            )
        return self._service

    def stats(self) -> dict[str, float]:
        return self._service.stats() if self._service is not None else {}

    def start_soon(self) -> None:
        self._starting = asyncio.create_task(self._start())

    async def started(self) -> None:
        """Return when starting has ended; raise why it failed."""
        if self._starting is not None:
            await asyncio.wait({self._starting})
        if self.failure is not None:
            raise self.failure

    async def _start(self) -> None:
        try:
            await self.engine.start()
            settings = ServiceSettings(
                model=self.settings.served_model,
                owner=_owner(self.settings),
                resident_bytes=_resident_bytes(self.engine.info),
                max_document_bytes=self.settings.max_document_bytes,
            )
            self._service = SessionService(self.store, self.engine, self.tokenizer, settings)
            await self._service.start(self.keys.tenants)
            self.phase = "ready"
            log.info("ready: %s on %s", self.settings.served_model, self.engine.info.device)
        except MnemosyneError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the server can't start")
            self._fail(EngineUnavailable(f"the server can't start: {error}"))

    def _fail(self, error: MnemosyneError) -> None:
        self.phase, self.failure = "failed", error
        log.error("the server can't start: %s", error.message)
        self.on_failed()

    async def drain(self) -> None:
        """Refuse new work, let running requests end for ``drain_seconds``, then save every session."""
        if self.phase == "draining":
            return
        self.phase = "draining"
        deadline = time.monotonic() + self.settings.drain_seconds
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._service is not None:
            await self._service.drain(max(1.0, deadline - time.monotonic()))

    async def stop(self) -> None:
        """Drain where that wasn't done, then close the engine and the store."""
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait({self._starting})
        await self.drain()
        await self.engine.close()
        await asyncio.to_thread(self.store.close)


def _resident_bytes(info: EngineInfo) -> int:
    """Room for states between requests: some is left to those that requests make. What an engine has no bound
    for is bounded here, for each device."""
    if info.room_bytes is not None:
        return info.room_bytes * 3 // 4
    return ServiceSettings.resident_bytes * (info.device.count(",") + 1)


def _owner(settings: Settings) -> str:
    """Who holds leases: the same after a restart on the same port, another for every other server of a
    store."""
    return f"{socket.gethostname()}:{settings.port or os.getpid()}"
