"""Peers beside a model of ours: as many parameters, the same vocabulary and width, in the same run. Knows no
table and none of their code.

Each peer has a process of its own, so what it does to the device's memory ends with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_gpu_decode import speed_of
from bench_gpu_ingest import warm
from bench_gpu_model import Subject, read_on, some_tokens
from bench_gpu_plan import Plan
from bench_gpu_report import Line, failed, left_out

NAMES = ("titans-pytorch", "llama")
PREFILL, DECODE = (25.0, 50.0), (15.0, 30.0)
"""How many times as fast as titans-pytorch at the least, and the aim."""
LEAST_SECONDS = 20.0


@dataclass(frozen=True)
class Ours:
    """What the peers are compared with, of one model."""

    name: str
    dim: int
    vocab: int
    parameters: int
    prefill: dict[int, float]
    """Tokens a second of one stream that reads so many."""
    decode: float
    """Tokens a second at the plan's ``peer_batch``."""


def measure_ours(subject: Subject, plan: Plan) -> Ours:
    """Raises CheckFailed."""
    warm(subject, plan)
    prefill = {}
    for length in plan.peer_tokens:
        ids = some_tokens(subject.config, 1, length, seed=6)
        speeds = []
        for _ in range(3):
            begun = [subject.model.initial_state()]
            speeds.append(length / read_on(subject, begun, ids, plan.piece, float("inf")).seconds)
        prefill[length] = sorted(speeds)[1]
    decode = speed_of(subject, plan.peer_batch, plan.peer_context, plan.steps).tokens
    config = subject.config
    return Ours(subject.name, config.dim, config.vocab_size, subject.parameters, prefill, decode)


def measure_peer(
    peer: str, ours: Ours, plan: Plan, device: str, seconds: float
) -> tuple[dict[str, Any], list[Line]]:
    """One peer matched to ``ours``, for ``seconds`` at most."""
    if seconds < LEAST_SECONDS:
        return {}, [left_out(f"{peer} beside {ours.name}", "the time was up")]
    found, error = _run(peer, ours, plan, device, seconds)
    if "parameters" not in found:
        if error.partition(":")[0].endswith("NotFoundError"):
            why = f"not here ({error}): name a folder that has it with --wheels"
            return found, [left_out(f"{peer} beside {ours.name}", why)]
        return found, [failed(f"{peer} beside {ours.name}", RuntimeError(error))]
    return found, _lines(peer, found, ours, plan, error)


def _run(peer: str, ours: Ours, plan: Plan, device: str, seconds: float) -> tuple[dict[str, Any], str]:
    """The last line that the process wrote, and what it ended with."""
    command = [sys.executable, str(Path(__file__).with_name("bench_gpu_peer.py")), peer, "--device", device]
    command += ["--dim", str(ours.dim), "--vocab", str(ours.vocab), "--parameters", str(ours.parameters)]
    command += ["--batch", str(plan.peer_batch), "--context", str(plan.peer_context)]
    command += ["--steps", str(plan.peer_steps), "--tokens", ",".join(map(str, plan.peer_tokens))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=seconds)
        error = err.strip().splitlines()[-1] if process.returncode and err.strip() else ""
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        error = f"ended after {seconds:.0f} s"
    said = [line for line in out.splitlines() if line.startswith("{")]
    return (json.loads(said[-1]) if said else {}), error


def _lines(peer: str, found: dict[str, Any], ours: Ours, plan: Plan, error: str) -> list[Line]:
    name = f"{peer}, {found['parameters'] / 1e6:,.0f}M parameters, {found['layers']} layers"
    prefill = {int(n): rate for n, rate in found.get("prefill", {}).items()}
    decode = {int(n): rate for n, rate in found.get("decode", {}).items()}
    captured = {int(n): rate for n, rate in found.get("captured", {}).items()}
    lines = [Line(f"{name}: tokens/s, prefill of {n:,}", rate) for n, rate in prefill.items()]
    for kind, rates in (("decode", decode), ("captured decode", captured)):
        lines += [Line(f"{name}: tokens/s, {kind}, batch {n}", rate, "{:,.1f}") for n, rate in rates.items()]
    targets = (PREFILL, DECODE) if peer == "titans-pytorch" else ((None, None), (None, None))
    (prefill_least, prefill_aim), (decode_least, decode_aim) = targets
    if prefill:
        longest = max(prefill)
        lines.append(
            Line(
                f"{ours.name}: times {peer}, prefill of {longest:,}",
                ours.prefill[longest] / prefill[longest],
                "{:,.1f}",
                least=prefill_least,
                aim=prefill_aim,
            )
        )
    batch = plan.peer_batch
    best = max(decode.get(batch, 0.0), captured.get(batch, 0.0))
    if best:
        lines.append(
            Line(
                f"{ours.name}: times {peer}, decode, batch {batch}",
                ours.decode / best,
                "{:,.1f}",
                least=decode_least,
                aim=decode_aim,
            )
        )
    # A peer that doesn't fit is a result about it and no fault of the bench.
    lines += [left_out(f"{name}: {what}", why) for what, why in found.get("errors", {}).items()]
    if error:
        lines.append(left_out(f"{name}: the rest", error))
    return lines


def remaining(until: float, most: float) -> float:
    return min(most, until - time.perf_counter())
