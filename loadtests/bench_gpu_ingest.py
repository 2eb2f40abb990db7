"""Ingest on a GPU: one stream, many streams, and one stream that reads on and on. Knows no table."""

from __future__ import annotations

import statistics

from bench_gpu_model import Reading, Subject, check_same, read_on, some_tokens
from bench_gpu_plan import Plan
from bench_gpu_report import Line
from roofline import Rates, explained, ingest, seconds

from mnemosyne.engine.state import SessionState

LEAST = {"760M": 110e3, "170M": 320e3}
"""Tokens a second of one stream."""
LEAST_AGGREGATE = {"170M": 700e3}
AIM_SHARE, LEAST_RATIO = 0.6, 0.95
MOST_BYTES = 32 * 2**20
"""By which the device's memory in use may grow: what one call allocates more than another."""
APART = 8
"""Sessions of a batch stand at as many different chunks."""


def measure_single(subject: Subject, rates: Rates, plan: Plan, until: float) -> list[Line]:
    """One stream of ``plan.single`` tokens. Raises CheckFailed."""
    warm(subject, plan)
    reading = _one(subject, plan.single, plan.piece, until)
    return [
        _line(subject, rates, f"one stream, {_told(reading.tokens, plan.single)}", reading, 1, LEAST),
        _written(subject, reading),
    ]


def measure_many(subject: Subject, rates: Rates, plan: Plan, until: float) -> list[Line]:
    """``plan.sessions`` streams that began apart, side by side. Raises CheckFailed, also where one of them,
    alone, becomes anything else."""
    config, card = subject.config, subject.card
    piece = max(config.chunk, plan.piece // plan.sessions // config.chunk * config.chunk)
    states = _apart(subject, plan.sessions)
    ids = some_tokens(config, plan.sessions, plan.each, seed=3)
    first = read_on(subject, states, ids[:, :piece], piece, until)
    for i in (0, plan.sessions // 2, plan.sessions - 1):
        (alone,), _ = subject.model.prefill([states[i]], ids[i : i + 1, :piece].to(card.device))
        check_same(first.states[i], alone, f"among {plan.sessions}")
    del first
    reading = read_on(subject, states, ids, piece, until)
    what = f"{plan.sessions} streams, {_told(reading.tokens, plan.each)} each"
    return [_line(subject, rates, what, reading, plan.sessions, LEAST_AGGREGATE), _written(subject, reading)]


def measure_long(subject: Subject, rates: Rates, plan: Plan, until: float) -> list[Line]:
    """One stream of ``plan.many`` tokens: its last calls against those after ``plan.early`` tokens. Raises
    CheckFailed."""
    warm(subject, plan)
    reading = _one(subject, plan.many, plan.piece, until)
    # The last call may be shorter than the others.
    whole = [w for w in reading.windows if w.tokens == plan.piece and w.end > plan.early]
    early, late = whole[: plan.windows], whole[-plan.windows :]
    before, after = (statistics.median(w.rate for w in part) for part in (early, late))
    grown = max(w.allocated for w in late) - max(w.allocated for w in early)
    name, told = subject.name, _told(reading.tokens, plan.many)
    return [
        _line(subject, rates, f"one stream, {told}", reading, 1, {}),
        Line(f"{name}: tokens/s after {plan.early:,} tokens, {len(early)} calls", before),
        Line(f"{name}: tokens/s at the end", after),
        Line(f"{name}: ratio of the two", after / before, "{:.3f}", least=LEAST_RATIO, aim=1.0),
        Line(f"{name}: device memory at the end, MB", max(w.allocated for w in late) / 1e6, "{:,.1f}"),
        Line(
            f"{name}: device memory grown meanwhile, MB",
            grown / 1e6,
            "{:,.1f}",
            least=MOST_BYTES / 1e6,
            aim=0.0,
            at_most=True,
        ),
        _written(subject, reading),
    ]


def warm(subject: Subject, plan: Plan) -> None:
    """What is compiled and captured at first use, for one stream in calls of ``plan.piece`` tokens."""
    _one(subject, 2 * plan.piece, plan.piece, float("inf"))


def _one(subject: Subject, tokens: int, piece: int, until: float) -> Reading:
    ids = some_tokens(subject.config, 1, tokens // subject.config.chunk * subject.config.chunk, seed=2)
    return read_on(subject, [subject.model.initial_state()], ids, piece, until)


def _apart(subject: Subject, sessions: int) -> list[SessionState]:
    """States of sessions that have read 1 to ``APART`` chunks, whole segments beside unfinished ones."""
    config, model = subject.config, subject.model
    states: list[SessionState | None] = [None] * sessions
    for chunks in range(1, APART + 1):
        which = [i for i in range(sessions) if i % APART == chunks - 1]
        if which:
            ids = some_tokens(config, len(which), chunks * config.chunk, seed=100 + chunks)
            made, _ = model.prefill([model.initial_state()] * len(which), ids.to(subject.card.device))
            for i, state in zip(which, made, strict=True):
                states[i] = state
    return [state for state in states if state is not None]


def _line(
    subject: Subject, rates: Rates, what: str, reading: Reading, sessions: int, least: dict[str, float]
) -> Line:
    work = ingest(subject.config, subject.operand, sessions)
    return Line(
        f"{subject.name}: tokens/s, {what}",
        sum(w.tokens for w in reading.windows) / reading.seconds,
        limit=1 / seconds(work, rates),
        limit_is=explained(work, rates) + " a token",
        least=least.get(subject.preset),
        aim_share=AIM_SHARE if least else None,
    )


def _written(subject: Subject, reading: Reading) -> Line:
    return Line(f"{subject.name}: share of chunks written", reading.written, "{:.1%}")


def _told(read: int, wanted: int) -> str:
    """Whether the time sufficed."""
    return f"{read:,} tokens" if read >= wanted else f"{read:,} of {wanted:,} tokens, then the time was up"
