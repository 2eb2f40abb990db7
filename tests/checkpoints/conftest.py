"""A place for sessions, as a directory and as a real Redis, that can be opened any number of times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.checkpoints.redis_store import RedisStore
from mnemosyne.checkpoints.store import SessionStore


class Place:
    """``open`` gives a new store object on the same data, as another process would have."""

    def __init__(self, kind: str, where: str) -> None:
        self.kind = kind
        self.where = where
        self._opened: list[SessionStore] = []

    def open(self) -> SessionStore:
        store: SessionStore = (
            DirectoryStore(self.where) if self.kind == "directory" else RedisStore(self.where)
        )
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Place]:
    place = Place("directory", str(tmp_path / "data"))
    yield place
    place.close()


@pytest.fixture
def redis_place(redis_server: Any) -> Iterator[Place]:
    place = Place("redis", redis_server.url)
    yield place
    place.close()


@pytest.fixture(params=["directory", "redis"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue("directory" if request.param == "directory" else "redis_place")
    return found


@pytest.fixture
def store(place: Place) -> SessionStore:
    return place.open()


@pytest.fixture
def held(store: SessionStore) -> Callable[[str], int]:
    """Make a session and own it; gives the fence."""

    def make(session_id: str) -> int:
        assert store.create(session_id, "tenant", b"made")
        return store.acquire(session_id, "me", 60).fence

    return make
