"""The engine's process: a checkpoint made into an engine and served on an inherited socket.

    python -m mnemosyne.server.engine_main --checkpoint DIR --socket-fd N ...

Puts together what the engine itself may not know: files, snapshots, a command line. ``engine.client`` starts
it.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mnemosyne.checkpoints.snapshot import dump_state, load_state
from mnemosyne.checkpoints.weights import load_checkpoint
from mnemosyne.engine import numerics, room
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.errors import EngineError, MnemosyneError
from mnemosyne.engine.gpu.choice import served
from mnemosyne.engine.holdings import tensor_bytes
from mnemosyne.engine.messages import EngineInfo
from mnemosyne.engine.model import Titans
from mnemosyne.engine.process import refuse, serve
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.state import SessionState

log = logging.getLogger("mnemosyne.engine")


def make_engine(
    checkpoint: Path,
    *,
    device: str = "cpu",
    precision: numerics.Precision = "auto",
    threads: int | None = None,
    max_queued_tokens: int | None = None,
    device_state_bytes: int | None = None,
    host_state_bytes: int | None = None,
    engines: int = 1,
) -> Engine:
    """An engine for the checkpoint in a folder, one of ``engines`` on this machine. Sets this process's
    number of threads; None: as many as it may use. Limits and budgets that aren't given follow from the
    device.

    Raises ConfigError for a folder, weights or a device that can't be used."""
    torch.set_num_threads(threads or _processors())
    place = numerics.pick_device(device)
    found = load_checkpoint(checkpoint)
    compute = numerics.choose(place, precision)
    titans = Titans(found.config)
    titans.load_state_dict(found.tensors(titans.state_dict()))
    model = served(titans.to(place).prepare(compute))
    initial = model.initial_state()
    facts = numerics.describe(place, compute, "reference" if model is titans else "triton")
    info = EngineInfo(
        model_fingerprint=found.fingerprint,
        numerics_fingerprint=numerics.fingerprint(facts),
        numerics=facts,
        config=dataclasses.asdict(found.config),
        device=device,
        dtype=facts["compute"],
        parameters=titans.parameter_count(),
        state_bytes=initial.nbytes,
        max_queued_tokens=0,
    )

    momentum = initial.tensors.get("momentum.0", torch.empty(0)).dtype

    def load(data: bytes) -> SessionState:
        state, _ = load_state(
            data,
            config=found.config,
            dtype=compute,
            momentum=momentum,
            model_fingerprint=found.fingerprint,
            device=place,
        )
        return state

    del titans  # the kernels' model has its weights in another order: what is free is free for states
    dump = partial(dump_state, model_fingerprint=found.fingerprint, numerics=facts)
    limits = Limits.for_device(place.type, max_queued_tokens)
    budgets = room.budgets(
        place, tensor_bytes(initial.tensors), device_state_bytes, host_state_bytes, engines
    )
    if budgets is not None:
        log.info("states take up to %d bytes on %s and %d on the host", budgets.device, place, budgets.host)
    return Engine(model, info, limits, dump, load, budgets)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    # A Ctrl-C in the server's terminal reaches this process too, and so does the SIGTERM of a supervisor that
    # signals all of a service. The server needs the engine to drain, and it ends with its connection.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    connection = socket.socket(fileno=options.socket_fd)
    connection.set_inheritable(False)
    try:
        engine = make_engine(
            options.checkpoint,
            device=options.device,
            precision=options.dtype,
            threads=options.threads,
            max_queued_tokens=options.max_queued_tokens,
            device_state_bytes=options.device_state_bytes,
            host_state_bytes=options.host_state_bytes,
            engines=options.engines,
        )
    except MnemosyneError as error:
        refuse(connection, error)
        sys.exit(1)
    except Exception as error:
        log.exception("the engine can't be made")
        refuse(connection, EngineError(f"the engine can't be made: {type(error).__name__}: {error}"))
        sys.exit(1)
    serve(connection, engine)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="engine_main", description="Serve one engine on an inherited socket."
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-queued-tokens", type=int)
    parser.add_argument("--device-state-bytes", type=int)
    parser.add_argument("--host-state-bytes", type=int)
    parser.add_argument("--engines", type=int, default=1, help="on this machine, this one included")
    return parser.parse_args(arguments)


def _processors() -> int:
    """Those that this process may run on, which a container can limit below what the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    main()
