"""The engine and the store that settings ask for. Knows how each is made, not what it is used for."""

from __future__ import annotations

import sys

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.interface import EngineLike
from mnemosyne.server.settings import Settings


def make_engine(settings: Settings) -> EngineLike:
    """An engine in a process of its own; it isn't started yet."""
    command = [
        sys.executable,
        "-m",
        "mnemosyne.server.engine_main",
        "--checkpoint",
        str(settings.checkpoint),
        "--device",
        settings.device,
        "--dtype",
        settings.dtype,
        "--max-queued-tokens",
        str(settings.max_queued_tokens),
    ]
    if settings.threads is not None:
        command += ["--threads", str(settings.threads)]
    return EngineClient(command)


def make_store(settings: Settings) -> SessionStore:
    """Redis where one is set, else the data directory. Raises StoreUnavailable."""
    if settings.redis_url is not None:
        from mnemosyne.checkpoints.redis_store import RedisStore

        return RedisStore(settings.redis_url)
    return DirectoryStore(settings.data_dir)
