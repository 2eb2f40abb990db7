"""An engine behind a stream socket, in a process that computes for one client and ends with it.

Owns the three threads of such a process: the caller's computes, one reads (so that a Cancel arrives during a
step), one writes (so that a slow reader at the other end delays no step). Knows no checkpoint and no command
line.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections.abc import Sequence

from mnemosyne.engine import wire
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import EngineError, MnemosyneError
from mnemosyne.engine.loop import Loop
from mnemosyne.engine.messages import Event, Failed, Request

log = logging.getLogger(__name__)


def serve(connection: socket.socket, engine: Engine) -> None:
    """Send EngineInfo, then serve ``connection`` until its other end is gone; then the process
    exits, unless that end was gone before.

    It exits at once, in the middle of a step too: nothing that it holds is needed by anyone then."""
    outbox: queue.SimpleQueue[Sequence[Event]] = queue.SimpleQueue()
    loop = Loop(engine, outbox.put)
    try:
        connection.sendall(wire.encode(engine.info))
    except OSError:
        return  # the server ended while the engine was being made
    threading.Thread(target=_read, args=(connection, loop), name="engine-read", daemon=True).start()
    threading.Thread(target=_write, args=(connection, outbox), name="engine-write", daemon=True).start()
    loop.run()


def refuse(connection: socket.socket, error: MnemosyneError) -> None:
    """Tell the client why there won't be an engine, in place of EngineInfo."""
    reason = Failed(request_id="", error=type(error).__name__, message=error.message)
    connection.sendall(wire.encode(reason))


def _read(connection: socket.socket, loop: Loop) -> None:
    status = 1
    try:
        with connection.makefile("rb") as stream:
            while (message := wire.read(stream)) is not None:
                if not isinstance(message, Request):
                    raise EngineError(f"{type(message).__name__} isn't a request")
                loop.post(message)
        status = 0
    except (EngineError, OSError) as error:
        log.error("the engine's connection is unusable: %s", error)
    finally:
        os._exit(status)


def _write(connection: socket.socket, outbox: queue.SimpleQueue[Sequence[Event]]) -> None:
    try:
        while True:
            connection.sendall(b"".join(map(wire.encode, outbox.get())))
    except OSError:
        log.info("the engine's client is gone")
    except EngineError as error:
        log.error("an event can't be sent: %s", error)
    finally:
        os._exit(1)
