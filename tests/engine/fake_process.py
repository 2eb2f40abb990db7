"""A process that serves the fake model: what ``server.engine_main`` is to a checkpoint, for tests of the
client.

``--slow S`` makes each prefill take S seconds; ``--refuse`` ends with a reason, ``--crash`` without one;
``--once FILE`` serves the first time only; ``--other FILE`` serves another model once the file is there;
``--garbage`` answers with bytes that are no frame.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fakes import FakeModel, fake_engine
from torch import Tensor

from mnemosyne.engine.errors import ConfigError
from mnemosyne.engine.process import refuse, serve
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace


class SlowModel(FakeModel):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def prefill(
        self, states: Sequence[SessionState], tokens: Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace]:
        time.sleep(self.seconds)
        return super().prefill(states, tokens, per_token)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--once", type=Path)
    parser.add_argument("--other", type=Path)
    for flag in ("--refuse", "--crash", "--garbage"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    connection = socket.socket(fileno=options.socket_fd)
    if options.refuse:
        refuse(connection, ConfigError("there is no such checkpoint"))
        sys.exit(2)
    if options.crash or (options.once is not None and options.once.exists()):
        sys.exit(3)
    if options.once is not None:
        options.once.touch()
    if options.garbage:
        connection.sendall(b"\xff" * 64)
        time.sleep(60)
    engine = fake_engine(SlowModel(options.slow))
    if options.other is not None and options.other.exists():
        engine.info = replace(engine.info, model_fingerprint="another")
    serve(connection, engine)


if __name__ == "__main__":
    main()
