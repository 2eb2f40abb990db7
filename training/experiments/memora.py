"""Does Memora stay normalised, and what does it recall?

Claim: MIRAS (27): every row of W is a distribution. Memora as it is here moves log W linearly and makes W of
it exactly. The paper's chunk form takes one exact step a chunk and accumulates the rest linearly on W
(31-32): that form is written out below, for comparison, with the exact one's gates and with its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mnemosyne.kernels import network
from mnemosyne.kernels.gates import decays
from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.kernels.rules.rule import MemoryRule, Retention
from mnemosyne.training.experiments import measures, tasks
from mnemosyne.training.experiments.learner import PAPER, Learner, Limits, Task, relative_error, train
from mnemosyne.training.experiments.report import Line, Panel, Table

SMALLEST = 1e-6
"""Where the paper's form needs a logarithm of an entry that is not positive, of this."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    d: int
    loads: tuple[int, ...]
    long: int
    """Tokens of the stream in which W is watched."""
    chunk: int
    seeds: int
    batch: int
    steps: int
    judged: int


SETTINGS = {
    "tiny": Setting(d=8, loads=(4, 8), long=64, chunk=4, seeds=2, batch=2, steps=2, judged=4),
    "small": Setting(d=16, loads=(8, 16, 32), long=4096, chunk=8, seeds=4, batch=8, steps=400, judged=64),
    "full": Setting(
        d=32, loads=(16, 32, 64, 128), long=32768, chunk=8, seeds=8, batch=32, steps=1500, judged=128
    ),
}


def paper_store(learner: Learner, task: Task, length: int) -> list[list[Tensor]]:
    """The paper's chunk form: per chunk one exact step, then W itself moves linearly, with gradients at the
    weights after that step. W `[B, H, out, in]` of every memory layer, after every chunk."""
    B, H, T, d = task.keys.shape
    n, depth = T // length, len(learner.initial)
    gates = learner.gates(task).chunks(length)
    assert gates.alpha is not None
    rest = decays(gates.map(lambda gate: gate[..., 1:]))
    k, v = (x.reshape(B * H, n, length, d) for x in (task.keys, task.values))
    W = [torch.softmax(m, -1).expand(B, *m.shape).flatten(0, 1) for m in learner.initial]
    seen = []
    for c in range(n):
        first = network.gradient_factors(W, k[:, c, :1], v[:, c, :1], None, learner.rule)
        theta, alpha = (gate[..., c, 0].reshape(B * H, depth, 1, 1) for gate in (gates.theta, gates.alpha))
        for i in range(depth):
            step = theta[:, i] * first.deltas[i].transpose(1, 2) @ first.inputs[i]
            W[i] = torch.softmax((1 - alpha[:, i]) * W[i].clamp(min=SMALLEST).log() - step, -1)
        later = network.gradient_factors(W, k[:, c, 1:], v[:, c, 1:], None, learner.rule)
        A = rest.A[..., c, -1].reshape(B * H, depth, 1, 1)
        weight = rest.G[..., c, -1, :].reshape(B * H, depth, -1, 1)
        for i in range(depth):
            W[i] = A[:, i] * W[i] - (weight[:, i] * later.deltas[i]).transpose(1, 2) @ later.inputs[i]
        seen.append([w.view(B, H, *w.shape[1:]) for w in W])
    return seen


def paper_answer(length: int) -> Callable[[Learner, Task], Tensor]:
    def answer(learner: Learner, task: Task) -> Tensor:
        weights = [w.flatten(0, 1) for w in paper_store(learner, task, length)[-1]]
        B, H, Q, d = task.queries.shape
        return network.retrieve(weights, task.queries.reshape(B * H, Q, d), PAPER).view(B, H, Q, d)

    return answer


def exact_answer(length: int) -> Callable[[Learner, Task], Tensor]:
    return lambda learner, task: learner(task, length)


def draw(seed: int, setting: Setting, pairs: int, batch: int, device: torch.device) -> Task:
    g = tasks.generator(seed, device)
    shape = (batch, setting.seeds, pairs, setting.d)
    k, v = tasks.keys(g, *shape), tasks.normal(g, *shape)
    return Task(k, v, k, v)


class Form(NamedTuple):
    name: str
    learner: Learner
    answer: Callable[[Learner, Task], Tensor]
    simplex: bool = True
    """Whether its rows are meant to be distributions."""


def formed(setting: Setting, device: torch.device) -> list[Form]:
    """Every form with what it was trained to."""
    d, L, loads = setting.d, setting.chunk, setting.loads
    memora = make_rule("memora", depth=2, architecture=PAPER, clip=None, options={})
    square = dataclasses.replace(memora, retention=Retention())

    def trained(rule: MemoryRule, answer: Callable[[Learner, Task], Tensor], alpha: float = 0.5) -> Learner:
        limits = Limits(alpha=alpha)
        learner = Learner(rule, [d, 4 * d, d], setting.seeds, seed=7, limits=limits).to(device)
        train(
            learner,
            lambda i: draw(i, setting, loads[i % len(loads)], setting.batch, device),
            setting.steps,
            L,
            rate=0.03,
            answer=answer,
        )
        return learner

    exact, paper = exact_answer(L), paper_answer(L)
    ours = trained(memora, exact)
    return [
        Form("memora", ours, exact),
        Form("memora, never forgets", trained(memora, exact, alpha=0.0), exact),
        Form("paper's form, its own gates", trained(memora, paper), paper),
        Form("paper's form, memora's gates", ours, paper),
        Form("square loss, weight decay", trained(square, exact), exact, simplex=False),
    ]


def run(setting: Setting, device: torch.device) -> tuple[list[Table], list[Panel]]:
    forms, loads = formed(setting, device), setting.loads
    rows, lines = [], []
    for form in forms:
        near, error = recall(form, setting, device)
        cells = [measures.percent(r) for r in near] + [measures.shown(e) for e in error]
        rows.append([form.name, *cells, measures.percent(lately(form, setting, device))])
        mean, half = zip(*(measures.interval(100 * r) for r in near), strict=True)
        lines.append(Line(label=form.name, x=loads, y=mean, half=half))
    columns = ["memory", *(f"{n} pairs, %" for n in loads), *(f"error, {n}" for n in loads)]
    columns.append(f"last {loads[0]} of {setting.long} pairs, %")
    tables = [Table(title="Right value nearest, and relative error", columns=columns, rows=rows)]
    panels = [
        Panel(title="recall", x="stored pairs", y="right value nearest, %", lines=lines, logarithmic="x")
    ]
    table, panel = watched([form for form in forms if form.simplex], setting, device)
    return [*tables, table], [*panels, panel]


@torch.no_grad()
def recall(form: Form, setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """Recall and relative error `[loads, seeds]`."""
    near, error = [], []
    for pairs in setting.loads:
        task = draw(10**6 + pairs, setting, pairs, setting.judged, device)
        answered = form.answer(form.learner, task).nan_to_num(1e9, 1e9, -1e9)
        right = torch.arange(pairs, device=device)
        near.append(measures.nearest(answered, task.values, right).mean((0, 2)))
        error.append(relative_error(answered, task.answers).mean((0, 2)))
    return torch.stack(near).cpu(), torch.stack(error).cpu()


@torch.no_grad()
def lately(form: Form, setting: Setting, device: torch.device) -> Tensor:
    """Recall of a long stream's last pairs, as many as the smallest load, among their values `[seeds]`."""
    last = setting.loads[0]
    task = draw(2 * 10**6, setting, setting.long, setting.batch, device)
    task = task._replace(queries=task.queries[:, :, -last:], answers=task.answers[:, :, -last:])
    answered = form.answer(form.learner, task).nan_to_num(1e9, 1e9, -1e9)
    return measures.nearest(answered, task.answers, torch.arange(last, device=device)).mean((0, 2)).cpu()


@torch.no_grad()
def watched(forms: list[Form], setting: Setting, device: torch.device) -> tuple[Table, Panel]:
    """The rows of W at chunk ends of one long stream in fp32."""
    task = draw(3 * 10**6, setting, setting.long, 1, device)
    exact = forms[0].answer
    rows, sums = [], []
    for form in forms:
        if form.answer is exact:
            scanned = form.learner.store(task, setting.chunk)
            kept = [starts[0, :, 1:, 0] for starts in scanned.starts]  # [H, chunks, out, in]
            weights = [torch.softmax(z, -1) for z in kept]
        else:
            seen = paper_store(form.learner, task, setting.chunk)
            weights = [torch.stack([w[i][0] for w in seen], 1) for i in range(len(seen[0]))]
        off = torch.stack([(w.sum(-1) - 1).abs().amax((0, 2)) for w in weights]).amax(0).cpu()
        low = min(float(w.min()) for w in weights)
        negative = sum(int((w < 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        last = max(float(w[:, -1].max()) * w.shape[-1] for w in weights)
        cells = [f"{float(off.max()):.1e}", f"{low:.1e}", f"{100 * negative:.1f}", f"{last:.4f}"]
        rows.append([form.name, *cells])
        every = max(1, len(off) // 64)
        places = [setting.chunk * (i + 1) for i in range(0, len(off), every)]
        sums.append(Line(label=form.name, x=places, y=[max(float(x), 1e-8) for x in off[::every]]))
    columns = ["memory", "row sums off 1 by", "smallest entry", "negative entries, %"]
    columns.append("largest entry at the end, times columns (1: uniform)")
    title = f"W at the chunk ends of {setting.long} tokens, fp32"
    panel = Panel(
        title="off the simplex (1e-8: not at all)",
        x="tokens",
        y="row sums off 1 by",
        lines=sums,
        logarithmic="y",
    )
    return Table(title=title, columns=columns, rows=rows), panel
