"""Decoding on a GPU: sessions that emit tokens together, each at another place in its chunk, by the runner
that an engine has: full chunks are committed beside the others' tokens. Knows no table.

The next token is the largest logit's, taken on the device: sampling and the way to the host are the server's
and measured through it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from bench_gpu_model import Subject, check_finite, pending, some_tokens, tokens_of
from bench_gpu_plan import Plan
from bench_gpu_report import Line, failed, left_out
from bench_report import CheckFailed
from roofline import Rates, decode, explained, seconds
from torch import Tensor

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.runner import Decoding, Logits, Model, Runner
from mnemosyne.engine.state import SessionState

LEAST_SHARE, AIM_SHARE = 0.4, 0.6
GROUP_TOKENS = 65_536
"""Of the contexts that are read in one call."""
WARM = 32
"""Steps before the clock starts, besides those in which every session commits a chunk."""


class Greedy:
    """A model that answers with its largest logits' tokens, `[B, 1]`, in place of the logits."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.logits = torch.zeros(0)
        """Of the newest step."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def open_chunk(self, states: Sequence[SessionState]) -> tuple[Tensor, list[OpenChunk]]:
        self.logits, chunks = self._model.open_chunk(states)
        return self.logits.argmax(1, keepdim=True), chunks

    def decode(self, chunks: Sequence[OpenChunk], tokens: Tensor) -> Tensor:
        self.logits = self._model.decode(chunks, tokens)
        return self.logits.argmax(1, keepdim=True)


class Sessions:
    """That emit a token in every step, but for those whose chunk is being committed."""

    def __init__(self, model: Model, states: list[SessionState], pick: Callable[[Logits], int]) -> None:
        """``states`` have something pending; ``pick``: the token of what the model answers."""
        self._runner, self._pick = Runner(model), pick
        self.rows = [Decoding(state) for state in states]

    @torch.inference_mode()
    def step(self) -> dict[int, Logits]:
        """What the model answered, of each session that emitted a token. Raises CheckFailed."""
        told = {}
        for i, (row, answer) in enumerate(zip(self.rows, self._runner.decode(self.rows), strict=True)):
            if isinstance(answer, MnemosyneError):
                raise CheckFailed(f"decode: {answer.message}")
            if answer is not None:
                told[i], row.next = answer, self._pick(answer)
        return told


class Speed(NamedTuple):
    tokens: float
    """A second, over all sessions."""
    missed: float
    """Share of all turns in which a session's chunk was being committed."""
    gap: float
    """Seconds between two tokens of a session, which 99 of 100 don't pass."""


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
            speed = speed_of(subject, batch, plan.context, plan.steps)
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
                speed.tokens,
                "{:,.1f}" if speed.tokens < 1000 else "{:,.0f}",
                limit=batch / seconds(work, rates),
                limit_is=f"{batch} * {explained(work, rates)}"[0 if batch > 1 else 4 :],
                least_share=LEAST_SHARE,
                aim_share=AIM_SHARE,
            )
        )
        of_it = f"{subject.name}: batch {batch}"
        lines.append(Line(f"{of_it}, turns missed while a chunk was committed", speed.missed, "{:.1%}"))
        lines.append(Line(f"{of_it}, ms between two tokens, 99 of 100", speed.gap * 1000, "{:,.1f}"))
    return lines


def speed_of(subject: Subject, batch: int, context: int, steps: int) -> Speed:
    """When chunks fill up all the time. Raises CheckFailed where one session's bits depend on the others."""
    states = _contexts(subject, batch, context)
    _check_alone(subject, states)
    greedy = Greedy(subject.model)
    sessions = Sessions(cast(Model, greedy), states, lambda answer: int(answer[0]))
    del states  # the rows have them, and give them up as they commit
    while any(row.state.position == context for row in sessions.rows):
        sessions.step()
    for _ in range(WARM):
        sessions.step()
    gaps: list[float] = []
    newest: dict[int, float] = {}
    tokens = 0

    def run() -> None:
        nonlocal tokens
        for _ in range(steps):
            told = sessions.step()
            tokens += len(told)
            now = time.perf_counter()
            gaps.extend(now - newest[i] for i in told if i in newest)
            newest.update(dict.fromkeys(told, now))

    spent = subject.card.seconds(run)
    if not bool(torch.isfinite(greedy.logits).all()):
        raise CheckFailed(f"decode, batch {batch}: a logit isn't finite")
    check_finite([row.state for row in sessions.rows[:1]])
    return Speed(tokens / spent, 1 - tokens / (batch * steps), statistics.quantiles(gaps, n=100)[98])


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
    rows = sorted({0, len(states) - 1})
    alone = {i: _answers(subject, [states[i]], [0])[0] for i in rows}
    for i, together in zip(rows, _answers(subject, states, rows), strict=True):
        if any((one != other).any() for one, other in zip(alone[i], together, strict=True)):
            raise CheckFailed(f"isolation: a session decodes otherwise alone than among {len(states)}")


def _answers(subject: Subject, states: list[SessionState], rows: list[int]) -> list[list[Logits]]:
    """The logits of the first three tokens of the sessions ``rows``."""
    sessions = Sessions(subject.model, states, lambda answer: int(answer.argmax()))
    found: list[list[Logits]] = [[] for _ in rows]
    while any(len(told) < 3 for told in found):
        told = sessions.step()
        for answers, i in zip(found, rows, strict=True):
            if i in told and len(answers) < 3:
                answers.append(told[i])
    return found
