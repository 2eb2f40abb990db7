"""What the trace costs: the share of ingest time that goes into surprise, movement and the pyramid.

An engine in this process reads a text in the pieces that its scheduler makes of it. The clock is held around
the three places where a trace is computed, against the engine's own count of ingest seconds; on a CPU, where
a call's time is its own. Every committed chunk must be in the pyramid, or there is no number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from bench_machine import THREADS
from bench_reading import long_text
from bench_report import CheckFailed, Row, row

from mnemosyne.checkpoints.weights import Checkpoint
from mnemosyne.engine import commits, model
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.messages import (
    INITIAL,
    Advance,
    Event,
    Progress,
    ReadTrace,
    Request,
    Stats,
    StatsReport,
    TraceReport,
)
from mnemosyne.engine.pyramid import Pyramid
from mnemosyne.server.engine_main import make_engine
from mnemosyne.server.sessions.tokens import TextTokenizer

MOST = 0.02


def measure_trace(checkpoint: Checkpoint, tokens: int) -> tuple[dict[str, Any], list[Row]]:
    """Raises CheckFailed."""
    tokenizer = TextTokenizer.from_file(checkpoint.tokenizer_path)
    ids = tokenizer.encode_document(long_text(tokenizer, tokens))
    engine = make_engine(checkpoint.path, threads=THREADS)
    _read(engine, "warm", ids[: tokens // 4])
    before, spent = _ingest_seconds(engine), [0.0]
    with ExitStack() as clocks:
        for owner, name in ((model, "summarize"), (Pyramid, "extended"), (commits, "overall")):
            clocks.enter_context(_clock(owner, name, spent))
        events = _read(engine, "read", ids)
    seconds = _ingest_seconds(engine) - before
    steps = [len(event.trace) for event in events if isinstance(event, Progress)]
    _check(engine, sum(steps))
    share, chunks = spent[0] / seconds, sum(steps) / len(steps)
    result = {"tokens": len(ids), "share": round(share, 5), "chunks_a_step": round(chunks, 2)}
    rows = [
        row("share of ingest time for the trace", share, "{:.2%}", MOST, at_most=True),
        row("    chunks in a step, on average", chunks, "{:.1f}"),
    ]
    return result, rows


def _read(engine: Engine, name: str, ids: tuple[int, ...]) -> list[Event]:
    return _run(engine, Advance(request_id=name, tenant="", base=INITIAL, result=name, tokens=ids))


def _run(engine: Engine, request: Request) -> list[Event]:
    events = engine.accept(request)
    while not engine.idle:
        events += engine.step()
    return events


def _ingest_seconds(engine: Engine) -> float:
    [report] = _run(engine, Stats(request_id="stats"))
    assert isinstance(report, StatsReport)
    return report.values["ingest_seconds_total"]


def _check(engine: Engine, chunks: int) -> None:
    [report] = _run(engine, ReadTrace(request_id="trace", handle="read"))
    if not isinstance(report, TraceReport) or report.chunks != chunks:
        raise CheckFailed("trace: the pyramid isn't of the chunks that were read")
    if not np.isfinite(np.frombuffer(report.data, "<f4")).any():
        raise CheckFailed("trace: the pyramid holds nothing")


@contextmanager
def _clock(owner: Any, name: str, spent: list[float]) -> Iterator[None]:
    """Add the time inside ``owner.name`` to ``spent``."""
    inner: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*arguments, **more)
        finally:
            spent[0] += time.perf_counter() - began

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, inner)
