"""Lines to Redis that break at the worst moment: nothing is written twice, and nothing lands late."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from mnemosyne.checkpoints.redis_store import RedisStore
from mnemosyne.engine.errors import StoreUnavailable


@pytest.fixture
def client(redis_server: Any) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


def test_a_write_that_lands_late_is_kept_out(redis_server: Any) -> None:
    """Stopped, Redis takes commands into its sockets and runs them when it goes on, long after we gave up."""
    store = RedisStore(redis_server.url, timeout=0.3, connect_timeout=0.3)
    store.create("a", "t", b"made")
    fence = store.acquire("a", "me", 600).fence
    store.spool_append("a", "d", 0, b"kept", fence)
    for call in (
        lambda: store.append("a", [b"never", b"acknowledged"], fence),
        lambda: store.spool_append("a", "d", 4, b"never acknowledged", fence),
    ):
        os.kill(redis_server.process.pid, signal.SIGSTOP)
        with pytest.raises(StoreUnavailable):
            call()
        os.kill(redis_server.process.pid, signal.SIGCONT)
        assert list(store.read("a")) == [b"made"]
        assert store.spool_read("a", "d", 0, 100) == b"kept"
    assert store.append("a", [b"next"], fence) == 2
    assert store.spool_append("a", "d", 4, b"!", fence) == 5
    assert list(store.read("a")) == [b"made", b"next"]
    assert store.spool_read("a", "d", 0, 100) == b"kept!"
    store.close()


class Proxy:
    """A line to Redis that can be cut after a command went through and before its answer came back."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.swallow = b""
        """The answer to the next command that holds this is swallowed, and the line cut."""
        self.delay = b""
        """The next command that holds this waits on its way until ``arrive`` is set."""
        self.arrive = threading.Event()
        self.late: list[bytes] = []
        """What Redis answered to it."""
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(line,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, line: socket.socket) -> None:
        with line, socket.create_connection(("127.0.0.1", self._port)) as redis_line:
            while data := _receive(line):
                if self.delay and self.delay in data:
                    self.delay = b""
                    self.arrive.wait(10)
                    redis_line.sendall(data)
                    self.late.append(_receive(redis_line))
                    return
                redis_line.sendall(data)
                answer = _receive(redis_line)
                if self.swallow and self.swallow in data:
                    self.swallow = b""
                    return
                try:
                    line.sendall(answer)
                except OSError:
                    return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)


def _receive(line: socket.socket) -> bytes:
    try:
        return line.recv(1 << 20)
    except OSError:
        return b""


@pytest.fixture
def proxy(redis_server: Any) -> Iterator[Proxy]:
    proxy = Proxy(redis_server.port)
    yield proxy
    proxy.close()


def test_a_lost_answer_does_not_write_twice(proxy: Proxy, client: redis.Redis) -> None:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}/0", timeout=2)
    use_everything(store)  # so that Redis knows the scripts, and the first answer isn't that it doesn't
    proxy.swallow = b"first-record"
    assert store.create("a", "t", b"first-record", ("key", b"value"))
    assert not proxy.swallow
    assert list(store.read("a")) == [b"first-record"] and store.list_sessions("t", None, 9) == ["a"]
    proxy.swallow = b"the-owner"
    fence = store.acquire("a", "the-owner", 60).fence
    assert fence == 1 and not proxy.swallow
    proxy.swallow = b"second-record"
    assert store.append("a", [b"second-record", b"third-record"], fence) == 3 and not proxy.swallow
    assert list(store.read("a")) == [b"first-record", b"second-record", b"third-record"]
    assert store.journal_bytes("a") == sum(map(len, client.lrange("mnemosyne:{a}:journal", 0, -1)))
    proxy.swallow = b"spooled-bytes"
    assert store.spool_append("a", "d", 0, b"spooled-bytes", fence) == 13 and not proxy.swallow
    assert store.spool_read("a", "d", 0, 100) == b"spooled-bytes"
    proxy.swallow = b"snapshot-bytes"
    store.put_snapshot("a", 1, b"snapshot-bytes", fence)
    assert not proxy.swallow
    assert store.get_snapshot("a", 1) == b"snapshot-bytes"
    proxy.swallow = b"tenant:"  # only erasing names it now
    assert store.erase("a", fence)["snapshots"] == 1
    assert not proxy.swallow and not store.exists("a")
    assert [*client.scan_iter("*{a}*")] == []
    store.close()


def test_a_write_that_arrives_after_all_is_refused(proxy: Proxy) -> None:
    """Held up on its way while its client gave it up, did it again and went on."""
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}/0", timeout=0.3)
    use_everything(store)
    store.create("a", "t", b"made")
    fence = store.acquire("a", "me", 60).fence
    proxy.delay = b"held-up"
    assert store.append("a", [b"held-up"], fence) == 2
    assert store.append("a", [b"next"], fence) == 3
    proxy.arrive.set()
    wait_for(lambda: len(proxy.late) == 1)
    assert b"epoch" in proxy.late[0]
    assert list(store.read("a")) == [b"made", b"held-up", b"next"]
    proxy.arrive.clear()
    proxy.delay = b"held-up"
    assert store.spool_append("a", "d", 0, b"held-up", fence) == 7
    store.spool_delete("a", "d", fence)
    proxy.arrive.set()
    wait_for(lambda: len(proxy.late) == 2)
    assert store.spool_length("a", "d") == 0
    store.close()


def use_everything(store: RedisStore) -> None:
    store.create("warm", "other", b"made")
    fence = store.acquire("warm", "me", 60).fence
    store.append("warm", [b"x"], fence)
    store.spool_append("warm", "d", 0, b"x", fence)
    store.spool_delete("warm", "d", fence)
    store.put_snapshot("warm", 1, b"x", fence)
    store.erase("warm", fence)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
