"""Moneta's p and q: which are best, and what becomes of W as A shrinks.

Claims: MIRAS (24) and its ablation (p = 3 is best, p = 4 worst; q = 4). A memory of depth 2 in the paper's
form is trained for every pair of p and q. Then forgetting alone: with the paper's bare norm W grows without
bound as A goes to 0; with eps of A's own scale (kernels/rules/moneta.py) it doesn't.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.kernels import chunk
from mnemosyne.kernels.gates import Gates, decays
from mnemosyne.kernels.rules.moneta import FLOOR, PowerNorm
from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.training.experiments import measures, tasks
from mnemosyne.training.experiments.learner import PAPER, PLAIN, Learner, Limits, Task, relative_error, train
from mnemosyne.training.experiments.report import Line, Panel, Table

POWERS, NORMS = (1.5, 2.0, 3.0, 4.0), (2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    d: int
    loads: tuple[int, ...]
    chunk: int
    seeds: int
    batch: int
    steps: int
    judged: int
    silence: int = 1024
    """Tokens that only forget, at alpha 0.01."""


SETTINGS = {
    "tiny": Setting(d=8, loads=(4, 8), chunk=4, seeds=2, batch=2, steps=2, judged=4, silence=64),
    "small": Setting(d=16, loads=(8, 16, 32), chunk=8, seeds=4, batch=8, steps=200, judged=64),
    "full": Setting(d=32, loads=(16, 32, 64, 128), chunk=8, seeds=8, batch=32, steps=1000, judged=128),
}


def run(setting: Setting, device: torch.device) -> tuple[list[Table], list[Panel]]:
    near: dict[tuple[float, float], Tensor] = {}
    error: dict[tuple[float, float], Tensor] = {}
    for p in POWERS:
        for q in NORMS:
            near[p, q], error[p, q] = measured(p, q, setting, device)
    tables, panels = [], []
    for place, load in enumerate(setting.loads):
        for what, found, cell in (
            ("right value nearest, %", near, measures.percent),
            ("relative error", error, measures.shown),
        ):
            rows = [[f"p = {p:g}", *(cell(found[p, q][place]) for q in NORMS)] for p in POWERS]
            tables.append(
                Table(title=f"{load} pairs: {what}", columns=["", *(f"q = {q:g}" for q in NORMS)], rows=rows)
            )
        lines = []
        for q in NORMS:
            mean, half = zip(*(measures.interval(100 * near[p, q][place]) for p in POWERS), strict=True)
            lines.append(Line(label=f"q = {q:g}", x=POWERS, y=mean, half=half))
        panels.append(Panel(title=f"{load} pairs", x="p", y="right value nearest, %", lines=lines))
    table, panel = shrinking(setting, device)
    return [*tables, table], [*panels, panel]


def measured(p: float, q: float, setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """Recall and relative error `[loads, seeds]`."""
    d, loads = setting.d, setting.loads
    rule = make_rule("moneta", depth=2, architecture=PAPER, clip=None, options={"p": p, "q": q})
    limits = Limits(theta=10.0)  # the larger q is, the less of A is W
    learner = Learner(rule, [d, 4 * d, d], setting.seeds, seed=5, limits=limits).to(device)

    def drawn(seed: int, pairs: int, batch: int) -> Task:
        g = tasks.generator(seed, device)
        shape = (batch, setting.seeds, pairs, d)
        k, v = tasks.keys(g, *shape), tasks.normal(g, *shape)
        return Task(k, v, k, v)

    train(learner, lambda i: drawn(i, loads[i % len(loads)], setting.batch), setting.steps, setting.chunk)
    near, error = [], []
    with torch.no_grad():
        for pairs in loads:
            task = drawn(10**6 + pairs, pairs, setting.judged)
            answered = learner(task, setting.chunk).nan_to_num(1e9, 1e9, -1e9)
            near.append(
                measures.nearest(answered, task.values, torch.arange(pairs, device=device)).mean((0, 2))
            )
            error.append(relative_error(answered, task.answers).mean((0, 2)))
    return torch.stack(near).cpu(), torch.stack(error).cpu()


@dataclass(frozen=True, kw_only=True)
class Bare(PowerNorm):
    """The paper's norm with an eps that only keeps it from dividing by zero."""

    def factor(self, kept: Tensor) -> Tensor | None:
        norm = kept.abs().pow(self.q).sum((-1, -2)).pow(1 / self.q)
        return (norm + 1e-6).pow(2 - self.q)[:, None, None]


def shrinking(setting: Setting, device: torch.device) -> tuple[Table, Panel]:
    """What is kept and what is used of it while a memory only forgets, and then one chunk of pairs stored."""
    d, L, alpha, theta = setting.d, setting.chunk, 0.01, 0.05
    g = tasks.generator(6, device)
    begin = [tasks.normal(g, 1, 1, 4 * d, d) / d**0.5 * 2, tasks.normal(g, 1, 1, d, 4 * d) / (4 * d) ** 0.5]
    k, v = tasks.keys(g, 1, 1, 1, L, d), tasks.normal(g, 1, 1, 1, L, d) / d**0.5
    one = torch.ones(1, 1, 2, 1, L, device=device)
    rows, lines = [], []
    for name, retention in ((f"{FLOOR:g}", PowerNorm(q=4.0)), ("1e-6", Bare(q=4.0))):
        rule = make_rule("moneta", depth=2, architecture=PLAIN, clip=None, options={"p": 2.0, "q": 4.0})
        rule = dataclasses.replace(rule, retention=retention)
        places, norms = [], []
        for quiet in range(0, setting.silence + 1, setting.silence // 16):
            kept = [m * (1 - alpha) ** quiet for m in begin]
            used = rule.weights([m[0] for m in kept])
            scanned = chunk.scan(k, v, None, decays(Gates(theta * one, None, 0 * one)), kept, [], rule)
            after = rule.weights([m[0] for m in scanned.memory])
            moved = max(float((a - b).norm() / b.norm()) for a, b in zip(scanned.memory, kept, strict=True))
            size, later = (float(torch.stack([w.norm() for w in x]).norm()) for x in (used, after))
            places.append(float(quiet))
            norms.append(size)
            if quiet % (setting.silence // 4) == 0:
                a = float(torch.stack([m.norm() for m in kept]).norm())
                gradient = float(scanned.norms.mean())
                rows.append([name, str(quiet), *(f"{x:.2g}" for x in (a, size, gradient, moved, later))])
        lines.append(Line(label=f"eps {name}", x=places, y=norms))
    columns = [
        "eps",
        "tokens forgotten",
        "‖A‖",
        "‖W‖",
        "gradient's norm",
        "‖ΔA‖/‖A‖ of one chunk",
        "‖W‖ after it",
    ]
    head = f"q = 4, a memory that forgets at alpha {alpha} and then stores {L} pairs at theta {theta}"
    panel = Panel(title="W as A shrinks (q = 4)", x="tokens forgotten", y="‖W‖", lines=lines, logarithmic="y")
    return Table(title=head, columns=columns, rows=rows), panel
