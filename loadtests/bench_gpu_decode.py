"""Decoding on a GPU: sessions that emit tokens together, each at another place in its chunk, their chunks
committed when they are full as the engine does. Knows no table.

The next token is the largest logit's, taken on the device: sampling and the way to the host are the server's
and measured through it.
"""

from __future__ import annotations

import time

import torch
from bench_gpu_model import Subject, check_finite, pending, some_tokens, tokens_of
from bench_gpu_plan import Plan
from bench_gpu_report import Line, failed, left_out
from bench_report import CheckFailed
from roofline import Rates, decode, explained, seconds

from mnemosyne.engine.state import SessionState

LEAST_SHARE, AIM_SHARE = 0.4, 0.6
GROUP_TOKENS = 65_536
"""Of the contexts that are read in one call."""
WARM = 2
"""Steps before the clock starts, besides those in which every session commits a chunk."""


class Decoding:
    """Sessions that emit a token each in every step."""

    def __init__(self, subject: Subject, states: list[SessionState]) -> None:
        """``states`` have something pending."""
        self._subject, self._model = subject, subject.model
        self._chunk = subject.config.chunk
        self.logits, self.chunks = self._model.open_chunk(states)
        self.committing = 0.0
        """Seconds spent on full chunks."""

    def step(self) -> None:
        """Take the largest logit's token in and compute the logits after it; chunks that are full are
        committed first."""
        tokens = self.logits.argmax(1)
        full = [i for i, chunk in enumerate(self.chunks) if chunk.length == self._chunk]
        if full:
            card = self._subject.card
            card.wait()
            began = time.perf_counter()
            self._commit(full)
            card.wait()
            self.committing += time.perf_counter() - began
        self.logits = self._model.decode(self.chunks, tokens)

    def _commit(self, rows: list[int]) -> None:
        """Commit the chunks of ``rows`` and begin new ones."""
        ids = torch.tensor([self.chunks[i].tokens for i in rows], device=self._subject.card.device)
        states, _ = self._model.prefill([self.chunks[i].committed for i in rows], ids)
        for i, chunk in zip(rows, self._model.begin(states), strict=True):
            self.chunks[i] = chunk


def measure_decode(subject: Subject, rates: Rates, plan: Plan, until: float) -> list[Line]:
    """Every batch of the plan that fits, smallest first; one whose check failed has no number."""
    lines = []
    for batch in plan.batches:
        what = f"{subject.name}: decoded tokens/s, batch {batch}, after {plan.context:,} tokens"
        needed, free = batch * subject.state_bytes, subject.card.free()
        if needed > free:
            told = f"its states take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
            lines.append(left_out(what, told))
            continue
        if time.perf_counter() > until:
            lines.append(left_out(what, "the time was up"))
            continue
        try:
            speed, committing = speed_of(subject, batch, plan.context, plan.steps)
        except torch.OutOfMemoryError as error:
            lines.append(left_out(what, f"it doesn't fit: {error}"))
            continue
        except CheckFailed as error:
            lines.append(failed(what, error))
            continue
        work = decode(subject.config, subject.operand, batch)
        lines.append(
            Line(
                what,
                speed,
                "{:,.1f}" if speed < 1000 else "{:,.0f}",
                limit=batch / seconds(work, rates),
                limit_is=f"{batch} * {explained(work, rates)}"[0 if batch > 1 else 4 :],
                least_share=LEAST_SHARE,
                aim_share=AIM_SHARE,
            )
        )
        lines.append(Line(f"{subject.name}: of that time for committing chunks", committing, "{:.1%}"))
    return lines


def speed_of(subject: Subject, batch: int, context: int, steps: int) -> tuple[float, float]:
    """Tokens a second over all sessions, and the share of the time that committing took. Raises CheckFailed
    where one session's bits depend on the others."""
    states = _contexts(subject, batch, context)
    _check_alone(subject, states)
    decoding = Decoding(subject, states)
    for _ in range(subject.config.chunk + WARM):
        decoding.step()
    decoding.committing = 0.0

    def run() -> None:
        for _ in range(steps):
            decoding.step()

    spent = subject.card.seconds(run)
    if not bool(torch.isfinite(decoding.logits).all()):
        raise CheckFailed(f"decode, batch {batch}: a logit isn't finite")
    check_finite([chunk.committed for chunk in decoding.chunks[:1]])
    return batch * steps / spent, decoding.committing / spent


def _contexts(subject: Subject, batch: int, context: int) -> list[SessionState]:
    """Sessions that have read ``context`` tokens each, and one to a chunk besides: their chunks don't fill up
    together."""
    config = subject.config
    group = max(1, GROUP_TOKENS // context)
    states: list[SessionState] = []
    for first in range(0, batch, group):
        ids = some_tokens(config, min(group, batch - first), context, seed=1000 + first)
        begun = [subject.model.initial_state()] * len(ids)
        made, _ = subject.model.prefill(begun, ids.to(subject.card.device))
        states += made
    rest = tokens_of(config, config.chunk, seed=5).tolist()
    return [pending(state, rest[: 1 + i * config.chunk // batch]) for i, state in enumerate(states)]


def _check_alone(subject: Subject, states: list[SessionState]) -> None:
    """The first and the last session, three tokens alone, against the same among all. Raises CheckFailed."""
    together = Decoding(subject, states)
    rows = sorted({0, len(states) - 1})
    singles = {i: Decoding(subject, [states[i]]) for i in rows}
    for _ in range(3):
        for i, single in singles.items():
            if not torch.equal(single.logits[0], together.logits[i]):
                raise CheckFailed(f"isolation: a session decodes otherwise alone than among {len(states)}")
            single.step()
        together.step()
