"""Bringing a session's state from pinned host memory to the device, as the engine does it. Knows no table."""

from __future__ import annotations

import statistics
import time

from bench_gpu_model import Subject, check_same, some_tokens
from bench_gpu_plan import Plan
from bench_gpu_report import Line
from roofline import Rates

from mnemosyne.engine.copies import copier_for
from mnemosyne.engine.state import SessionState

LEAST_SHARE, AIM_SHARE = 0.3, 0.6


def measure_switch(subject: Subject, rates: Rates, plan: Plan, until: float) -> list[Line]:
    """Out and back, several times; the state must be the same and go on alike. Raises CheckFailed."""
    config, model, card = subject.config, subject.model, subject.card
    ids = some_tokens(config, 1, 2 * config.chunk, seed=4).to(card.device)
    (state,), _ = model.prefill([model.initial_state()], ids)
    copier = copier_for(card.device)
    away = copier.out(state.tensors)
    away.wait()
    taken = []
    for _ in range(plan.switches):
        card.wait()
        began = time.perf_counter()
        back = copier.back(away.tensors)
        back.wait()
        taken.append(time.perf_counter() - began)
        if began > until:
            break
    returned = SessionState(state.position, back.tensors, pyramid=state.pyramid)
    check_same(returned, state, "after it was moved out and back")
    (here,), _ = model.prefill([state], ids)
    (there,), _ = model.prefill([returned], ids)
    check_same(there, here, "read on after it was moved out and back")
    spent = statistics.median(taken)
    return [
        Line(
            f"{subject.name}: GB/s, a session of {subject.state_bytes / 1e6:,.1f} MB switched in",
            subject.state_bytes / spent / 1e9,
            "{:,.2f}",
            limit=rates.host / 1e9,
            limit_is="measured copy from pinned memory",
            least_share=LEAST_SHARE,
            aim_share=AIM_SHARE,
        ),
        Line(f"{subject.name}: ms for it", spent * 1e3, "{:,.2f}"),
    ]
