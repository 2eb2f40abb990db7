"""Stores of both kinds, an engine, and a service between them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.checkpoints.redis_store import RedisStore
from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.server.sessions.service import SessionService
from tests.server.sessions.harness import TENANT, make_engine, make_service


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[DirectoryStore]:
    store = DirectoryStore(tmp_path / "data")
    yield store
    store.close()


@pytest.fixture(params=["directory", "redis"])
def any_store(request: pytest.FixtureRequest) -> Iterator[SessionStore]:
    """Both places where sessions last, each the real thing."""
    if request.param == "directory":
        yield request.getfixturevalue("directory")
        return
    store = RedisStore(request.getfixturevalue("redis_server").url)
    yield store
    store.close()


@pytest.fixture
async def engine() -> AsyncIterator[InlineEngine]:
    made = make_engine()
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def service(directory: DirectoryStore, engine: InlineEngine) -> AsyncIterator[SessionService]:
    made = make_service(directory, engine)
    await made.start([TENANT])
    yield made
    await made.drain()
