"""The line to one Redis server. Owns the client, its timeouts, and what a failure is called; knows no
session.

redis-py's own retries are off: it would send a write again whose answer was lost, and it would be done twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mnemosyne.engine.errors import ConfigError, StoreUnavailable

log = logging.getLogger(__name__)
T = TypeVar("T")


class LostAnswer(StoreUnavailable):
    """The line broke while a command was under way: it may have been done or not. ``waited``:

    after the whole timeout.
    """


class RedisLink:
    def __init__(self, url: str, timeout: float, connect_timeout: float) -> None:
        """Raises ConfigError for a URL that isn't one and where redis-py isn't installed. Doesn't connect."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ConfigError("a Redis store needs the package redis") from error
        self._errors = redis.exceptions
        try:
            self.client: Any = redis.Redis.from_url(
                url,
                socket_timeout=timeout,
                socket_connect_timeout=connect_timeout,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigError(f"not the URL of a Redis: {error}") from error
        self._scripts: dict[str, Any] = {}
        self._durability_told = False

    def ask(self, question: Callable[[Any], T]) -> T:
        """Run a read, or a write that may be done twice; once more over a new line where the old one broke.

        Raises StoreUnavailable.
        """
        try:
            return self._once(lambda: question(self.client))
        except LostAnswer as error:
            if error.attributes["waited"]:
                raise
            return self._once(lambda: question(self.client))

    def run(self, script: str, keys: Sequence[str], args: Sequence[object]) -> list[Any]:
        """Run a script once.

        Raises LostAnswer where it may have been done, StoreUnavailable where it wasn't.
        """
        return self._once(lambda: self._script(script)(keys=keys, args=args))

    def run_again(self, script: str, keys: Sequence[str], args: Sequence[object]) -> list[Any]:
        """Run a script that may be done twice, as ``ask`` does."""
        return self.ask(lambda _: self._script(script)(keys=keys, args=args))

    def _script(self, text: str) -> Any:
        if text not in self._scripts:
            self._scripts[text] = self.client.register_script(text)
        return self._scripts[text]

    def check(self, probe: str) -> None:
        """Raise StoreUnavailable unless reads and writes work; warn where answers outrun the disk."""
        self.ask(lambda client: client.set(probe, b"1", px=1000))
        if not self._durability_told:
            self._tell_durability()
            self._durability_told = True

    def close(self) -> None:
        self.client.close()

    def _once(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except self._errors.ReadOnlyError as error:
            # A master that became a replica: new connections may find the new master.
            self.client.connection_pool.disconnect()
            raise StoreUnavailable(f"Redis can't be written: {error}") from error
        except (self._errors.BusyLoadingError, self._errors.AuthenticationError) as error:
            raise StoreUnavailable(f"Redis isn't ready: {error}") from error
        except (self._errors.ConnectionError, self._errors.TimeoutError, OSError) as error:
            waited = isinstance(error, (self._errors.TimeoutError, TimeoutError))
            raise LostAnswer(f"Redis can't be reached: {error}", waited=waited) from error
        except self._errors.RedisError as error:
            # Refused before anything was written: out of memory, a failing disk, no permission.
            raise StoreUnavailable(f"Redis refused: {error}") from error

    def _tell_durability(self) -> None:
        try:
            found = self.ask(lambda client: client.config_get("appendonly", "appendfsync"))
        except StoreUnavailable as error:
            log.warning("can't see whether Redis syncs every write (appendfsync always): %s", error.message)
            return
        if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
            log.warning(
                "Redis runs with appendonly %s, appendfsync %s: a crash of its machine may lose what was "
                "acknowledged. Set appendonly yes and appendfsync always.",
                found.get("appendonly"),
                found.get("appendfsync"),
            )
