"""An engine in a process of its own: starts it, talks to it, and starts it again when it dies.

Owns the process and the socket; what the process loads is the command's matter. The socket is one end of a
pair that only the two processes hold: it has no name for others to find, and the engine's end sees ours close
however we end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from asyncio.subprocess import Process
from collections.abc import Sequence

from mnemosyne.engine import wire
from mnemosyne.engine.calls import Calls, named
from mnemosyne.engine.errors import EngineError, EngineUnavailable, MnemosyneError
from mnemosyne.engine.messages import EngineInfo, Event, Failed, Request

log = logging.getLogger(__name__)


class EngineClient(Calls):
    """Satisfies ``interface.EngineLike``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str = "the engine",
        first_delay: float = 0.2,
        longest_delay: float = 30.0,
        close_seconds: float = 5.0,
    ) -> None:
        """``command`` starts the engine, once ``--socket-fd N`` is appended to it: the number of an inherited
        socket. Messages and logs call it ``name``.

        After a death the restart waits ``first_delay`` seconds, twice as long after each that follows within
        a minute of being ready, up to ``longest_delay``."""
        super().__init__()
        self._command = tuple(command)
        self._name = name
        self._first_delay = first_delay
        self._longest_delay = longest_delay
        self._close_seconds = close_seconds
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self._writer is not None

    @property
    def pid(self) -> int | None:
        """Of the engine's process, None while there is none."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        reader = await self._spawn()
        self._task = asyncio.create_task(self._supervise(reader), name="engine-client")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._bury(f"{self._name} was closed")

    def _send(self, request: Request) -> None:
        if self._writer is None:
            raise EngineUnavailable(f"{self._name} isn't running")
        self._writer.write(wire.encode(request))

    async def _spawn(self) -> asyncio.StreamReader:
        """Start the process and wait until it is ready. Raises what it refused with, or EngineUnavailable."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    "--socket-fd",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    # Threads that wait for each other must sleep, not spin: on cores that others use too (the
                    # server's own process does), spinning made reading 18 times slower.
                    env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                )
        except OSError as error:
            ours.close()
            raise EngineUnavailable(f"{self._name} can't be started: {error}") from error
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            first = await _read(reader)
            if isinstance(first, Failed):
                raise named(first)
            if not isinstance(first, EngineInfo):
                raise EngineUnavailable(f"{self._name} ended before it was ready")
        except BaseException:
            writer.close()
            await self._reap()
            raise
        self._info, self._writer = first, writer
        self._incarnation += 1
        return reader

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        delay = self._first_delay
        while True:
            began = time.monotonic()
            reason = await self._receive_until_end(reader)
            await self._bury(reason)
            if time.monotonic() - began > 60.0:
                delay = self._first_delay
            while True:
                log.error("%s; starting it again in %.1f s", reason, delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, self._longest_delay)
                try:
                    reader = await self._spawn()
                    break
                except MnemosyneError as error:
                    reason = error.message

    async def _receive_until_end(self, reader: asyncio.StreamReader) -> str:
        """Hand events on until there are no more, and say why."""
        try:
            while (message := await _read(reader)) is not None:
                if not isinstance(message, Event):
                    raise EngineError(f"{type(message).__name__} isn't an event")
                self._receive(message)
        except (EngineError, OSError) as error:
            return f"{self._name}: the connection broke: {error}"
        return f"{self._name}: the process ended"

    async def _bury(self, reason: str) -> None:
        """Let go of the connection and the process, with all that it held and was asked for."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._lose(reason)
        await self._reap()

    async def _reap(self) -> None:
        """Wait for the process, which ends when its connection does; kill it if it doesn't."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), self._close_seconds)
        except TimeoutError:
            process.kill()
            await process.wait()
        log.info("%s: process %d ended with status %s", self._name, process.pid, process.returncode)


async def _read(reader: asyncio.StreamReader) -> wire.Message | None:
    """The next message, None at the end of the stream."""
    try:
        prefix = await reader.readexactly(4)
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise EngineError("the connection ended inside a message") from error
    try:
        head = await reader.readexactly(wire.header_size(prefix))
        payload = await reader.readexactly(wire.payload_size(await reader.readexactly(8)))
    except asyncio.IncompleteReadError as error:
        raise EngineError("the connection ended inside a message") from error
    return wire.decode(head, payload)
