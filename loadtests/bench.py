"""``make bench``: how fast this machine ingests, beside titans-pytorch, and whether that stays so.

Every part checks its result before it is timed. Speeds are told as ratios of what was measured in the same
run; the last line of the output is JSON. loadtests/README.md has the formulas.

Exit status: 0, whatever the speeds; 1 where a result was wrong or nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import bench_model
from bench_constancy import measure_constancy
from bench_ingest import measure_ingest
from bench_machine import Machine
from bench_peer import measure_peer
from bench_report import CheckFailed, Row, table_of
from bench_trace import measure_trace
from rich.console import Console

from mnemosyne.checkpoints.weights import load_checkpoint
from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.server.cli.client import ApiError
from mnemosyne.server.settings import Settings

MANY = 1_000_000
WAITING = "OMP_WAIT_POLICY"
"""Threads that spin while they wait make two threads slower than one wherever something else runs. The
engine's process is started with ``PASSIVE``; this one, which measures our code and the peer's, must be like
it, and OpenMP reads it when it is loaded."""

console = Console(soft_wrap=True)


def run(folder: Path | None, many: int, quick: bool, result: dict[str, Any]) -> None:
    """Fill ``result`` part by part, and print each part's table as soon as it is measured."""
    checkpoint = load_checkpoint(folder or Settings.load().checkpoint)
    machine = Machine()
    result["checkpoint"] = {"name": checkpoint.path.name, "fingerprint": checkpoint.fingerprint}

    def show(name: str, title: str, part: tuple[dict[str, Any] | None, list[Row]]) -> None:
        result[name], rows = part
        console.print(table_of(title, rows), "")

    console.print((bench_model.__doc__ or "").partition("\n\n")[2], highlight=False, markup=False)
    console.print("reading a document to check it, then for the clock ...")
    nbytes, runs = (64 * 1024, 1) if quick else (384 * 1024, 3)
    show("ingest", "Ingest", measure_ingest(checkpoint, machine, nbytes, runs))
    result["machine"] = machine.facts()
    console.print("what the trace costs ...")
    show("trace", "Surprise", measure_trace(checkpoint, 8192 if quick else 65_536))
    console.print("beside titans-pytorch ...")
    tokens, steps, rounds = (2048, 12, 1) if quick else (8192, 32, 5)
    peer = measure_peer(checkpoint.path, tokens, steps, rounds)
    show("peer", "Beside titans-pytorch, in turns", peer)
    console.print(f"one session reads {many:,} tokens ...")
    constancy = measure_constancy(checkpoint, many, 4 if quick else 20)
    show("constancy", "While a session reads on", constancy)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="folder of the model; the served one if not given")
    parser.add_argument("--tokens", type=int, help=f"what the long session reads ({MANY:,})")
    parser.add_argument("--quick", action="store_true", help="a trial of about a minute; its numbers scatter")
    options = parser.parse_args()
    if WAITING not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {WAITING: "PASSIVE"})
    # Ended by a signal, it still takes its server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    result: dict[str, Any] = {"correct": True, "quick": options.quick}
    many = options.tokens or (40_000 if options.quick else MANY)
    try:
        run(options.checkpoint, many, options.quick, result)
    except (CheckFailed, MnemosyneError, ApiError, RuntimeError) as error:
        console.print(f"[red]the bench stopped:[/red] {error}")
        result |= {"correct": False, "error": str(error)}
    print(json.dumps(result), flush=True)
    return 0 if result["correct"] else 1


if __name__ == "__main__":
    sys.exit(main())
