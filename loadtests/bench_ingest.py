"""How fast a document goes through the real server, against what its counted FLOPs allow here.

Before anything is timed, the state that the server exports after the document must be the one that
``advance`` makes of the same token ids in this process, bit for bit; the states after the timed runs too.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_machine import THREADS, Machine
from bench_model import flops_per_token, load_model, read_in_process
from bench_reading import Reading, read
from bench_report import CheckFailed, Row, row
from demo_server import ServerProcess

from mnemosyne.checkpoints.snapshot import Manifest, load_state
from mnemosyne.checkpoints.weights import Checkpoint
from mnemosyne.engine import numerics
from mnemosyne.engine.state import SessionState
from mnemosyne.server.cli.client import Client
from mnemosyne.server.sessions.tokens import TextTokenizer
from mnemosyne.training.facts import demo_text

FP32_SHARE, FASTEST_SHARE, LEAST_WITH_BF16 = 0.25, 0.12, 4000.0


def server_for(checkpoint: Checkpoint, folder: str) -> ServerProcess:
    options = ["--checkpoint", str(checkpoint.path.resolve()), "--threads", str(THREADS)]
    return ServerProcess(Path(folder), options)


def measure_ingest(
    checkpoint: Checkpoint, machine: Machine, nbytes: int, runs: int
) -> tuple[dict[str, Any], list[Row]]:
    """The document once for the check, ``runs`` times for the clock. Raises CheckFailed."""
    text = demo_text(nbytes)
    ids = TextTokenizer.from_file(checkpoint.tokenizer_path).encode_document(text)
    machine.measure()
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-") as folder:
        server = server_for(checkpoint, folder)
        try:
            server.start()
            with Client(server.url) as client:
                _, state, manifest = _one(client, checkpoint, folder, text)
                share = _check(checkpoint, state, manifest, ids)
                readings = []
                for _ in range(runs):
                    reading, again, _ = _one(client, checkpoint, folder, text)
                    if again.digest() != state.digest():
                        raise CheckFailed("ingest: two sessions that read the same differ")
                    readings.append(reading)
        finally:
            server.kill()
    machine.measure()
    speed = statistics.median(reading.tokens_per_second for reading in readings)
    return _result(checkpoint, machine, manifest, readings[0].tokens, speed, share)


def _one(
    client: Client, checkpoint: Checkpoint, folder: str, text: str
) -> tuple[Reading, SessionState, Manifest]:
    """A new session reads the text and is erased; what it had become."""
    session_id = str(client.create_session()["id"])
    reading = read(client, session_id, text)
    file = Path(folder) / "state"
    client.export_state(session_id, file)
    client.delete_session(session_id, erase=True)
    return reading, *_state_in(file.read_bytes(), checkpoint)


def _state_in(data: bytes, checkpoint: Checkpoint) -> tuple[SessionState, Manifest]:
    """In the precision that it was computed in, which only the file itself says."""
    load = partial(load_state, data, config=checkpoint.config, model_fingerprint=checkpoint.fingerprint)
    _, manifest = load(dtype=torch.float32)
    return load(dtype=manifest.compute_dtype)


def _check(checkpoint: Checkpoint, state: SessionState, manifest: Manifest, ids: tuple[int, ...]) -> float:
    """Raise CheckFailed unless this process makes the same state; the share of chunks that were written."""
    torch.set_num_threads(THREADS)
    here = numerics.describe(torch.device("cpu"), manifest.compute_dtype)
    if here != manifest.numerics:
        raise CheckFailed(f"ingest: the server computes as {manifest.numerics}, this process as {here}")
    expected, watched = read_in_process(load_model(checkpoint.path, manifest.compute_dtype), ids)
    if state.tokens_seen != len(ids) or state.digest() != expected.digest():
        raise CheckFailed("ingest: the server's state isn't the one that advance() makes of the same ids")
    return watched.share_written


def _result(
    checkpoint: Checkpoint, machine: Machine, manifest: Manifest, tokens: int, speed: float, written: float
) -> tuple[dict[str, Any], list[Row]]:
    flops = flops_per_token(checkpoint.config)
    fp32, fastest = machine.fp32 / flops["total"], max(machine.fp32, machine.bf16) / flops["total"]
    aim = max(FP32_SHARE * fp32, FASTEST_SHARE * fastest, LEAST_WITH_BF16 if machine.has_bf16 else 0.0)
    result = {
        "tokens": tokens,
        "compute": manifest.numerics["compute"],
        "flops_per_token": flops,
        "tokens_per_second": round(speed, 1),
        "aim_tokens_per_second": round(aim, 1),
        "share_of_fp32_rate": round(speed / fp32, 4),
        "share_of_bf16_rate": round(speed * flops["total"] / machine.bf16, 4),
        "chunks_written": written,
    }
    rows = [
        row("counted MFLOP a token", flops["total"] / 1e6, "{:.2f}"),
        *(row(f"    {name}", count / 1e6, "{:.2f}") for name, count in flops.items() if name != "total"),
        row("matmul rate fp32, GFLOP/s", machine.fp32 / 1e9, "{:,.0f}"),
        row("matmul rate bf16, GFLOP/s", machine.bf16 / 1e9, "{:,.0f}"),
        row(f"tokens/s through the server, in {result['compute']}", speed, "{:,.0f}", aim),
        row("    of what the fp32 rate allows", speed / fp32, "{:.1%}"),
        row("    of what the bf16 rate allows", speed * flops["total"] / machine.bf16, "{:.1%}"),
        row("share of chunks written", written, "{:.1%}"),
    ]
    return result, rows
