"""Does forgetting keep a full memory useful?

Claim: Titans 3.1 and table 5 (weight decay is what contributes most). Streams far longer than what a memory
holds, with the forget gate shut, constant, and made from the token. An endless stream gives the gate nothing
to go by; a stream in topics marks the first token of each, and what came before is never asked for again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.training.experiments import measures, tasks
from mnemosyne.training.experiments.learner import PAPER, PLAIN, Learner, Limits, Task, relative_error, train
from mnemosyne.training.experiments.report import Line, Panel, Table

ARMS = (
    ("endless, never forgets", 0.0, False, False),
    ("endless, constant alpha", 1.0, False, False),
    ("topics, never forgets", 0.0, False, True),
    ("topics, constant alpha", 1.0, False, True),
    ("topics, alpha from the token", 1.0, True, True),
)
"""Name, largest alpha, whether the gates see the mark, whether there are topics."""
BLOCK = 32
"""Pairs asked for in training, the last ones, and the pairs among whose values the nearest is looked for; a
topic has as many."""
AGES = (0, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Setting:
    d: int
    trained: int
    """Tokens a stream in training."""
    judged: int
    """Tokens a stream that is judged."""
    streams: int
    chunk: int
    seeds: int
    batch: int
    steps: int


SETTINGS = {
    "tiny": Setting(d=8, trained=64, judged=128, streams=2, chunk=16, seeds=2, batch=2, steps=2),
    "small": Setting(d=16, trained=160, judged=1024, streams=16, chunk=8, seeds=4, batch=8, steps=150),
    "full": Setting(d=32, trained=512, judged=4096, streams=8, chunk=8, seeds=8, batch=32, steps=800),
}


def draw(seed: int, d: int, members: int, tokens: int, batch: int, device: torch.device) -> Task:
    """A stream of random pairs whose last BLOCK are asked for; members with topics see where one begins, and
    in training that is all that makes a difference."""
    g = tasks.generator(seed, device)
    k = tasks.keys(g, batch, members, tokens, d)
    v = tasks.normal(g, batch, members, tokens, d)
    mark = (torch.arange(tokens, device=device) % BLOCK == 0).float()
    return Task(
        k, v, k[:, :, -BLOCK:], v[:, :, -BLOCK:], mark[None, None, :, None].expand(batch, members, -1, 1)
    )


def run(setting: Setting, device: torch.device) -> tuple[list[Table], list[Panel]]:
    tables, panels = [], []
    for name, widths, architecture in (
        ("linear", [setting.d] * 2, PLAIN),
        ("depth 2, LN + residual", [setting.d, 4 * setting.d, setting.d], PAPER),
    ):
        near, error, early, alphas, norms = measured(widths, architecture, setting, device)
        ages = [*(age for age in AGES if age < setting.judged), setting.judged]
        spans = list(zip(ages, ages[1:], strict=False))
        rows, lines = [], []
        for arm, (title, *_) in enumerate(ARMS):
            by_age = [near[arm][:, setting.judged - b : setting.judged - a].mean(1) for a, b in spans]
            cells = [measures.percent(found) for found in by_age]
            last = error[arm][:, -BLOCK:].mean(1)
            rows.append(
                [
                    title,
                    *cells,
                    measures.shown(early[arm]),
                    measures.shown(last),
                    measures.shown(alphas[arm], 1, 3),
                    measures.shown(norms[arm], 1, 1),
                ]
            )
            mean, half = zip(*(measures.interval(100 * found) for found in by_age), strict=True)
            lines.append(Line(label=title, x=[(a + b) / 2 for a, b in spans], y=mean, half=half))
        columns = [
            "stream, memory",
            *(f"{a} to {b - 1}" for a, b in spans),
            f"error, last {BLOCK} of {setting.trained}",
            f"of {setting.judged}",
            "mean alpha",
            "‖M‖",
        ]
        head = f"{name} memory after {setting.judged} pairs: right value nearest, % by age"
        tables.append(Table(title=head, columns=columns, rows=rows))
        panels.append(
            Panel(
                title=f"{name} memory",
                x="age in pairs",
                y="right value nearest, %",
                lines=lines,
                logarithmic="x",
            )
        )
    return tables, panels


def measured(
    widths: list[int], architecture: Architecture, setting: Setting, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """After training: whether the right value is nearest in its block, and the relative error, `[arms, seeds,
    tokens]`; the error of the last block of a stream no longer than those in training, the mean alpha and the
    norm of the memory at the end, `[arms, seeds]`."""
    S, T = setting.seeds, setting.judged
    members = [arm for arm in ARMS for _ in range(S)]
    rule = make_rule("titans", depth=len(widths) - 1, architecture=architecture, clip=None, options={})
    limits = Limits(eta=0.0, alpha=[arm[1] for arm in members])
    seeing = torch.tensor([[float(arm[2])] for arm in members])
    learner = Learner(rule, widths, len(members), seed=3, limits=limits, features=1, seeing=seeing).to(device)
    train(
        learner,
        lambda i: draw(i, setting.d, len(members), setting.trained, setting.batch, device),
        setting.steps,
        setting.chunk,
    )
    with torch.no_grad():
        short = draw(10**6 + 1, setting.d, len(members), setting.trained, setting.streams, device)
        early = relative_error(learner(short, setting.chunk), short.answers).mean((0, 2))
        task = draw(10**6, setting.d, len(members), T, setting.streams, device)
        kept = learner.store(task, setting.chunk).memory
        answered = learner.retrieve(kept, task.keys)
        blocks = [x.unflatten(2, (-1, BLOCK)).flatten(1, 2) for x in (answered, task.values)]
        right = measures.nearest(blocks[0], blocks[1], torch.arange(BLOCK, device=device))
        near = right.unflatten(1, (len(members), -1)).flatten(2, 3).mean(0)
        error = relative_error(answered, task.values).mean(0)
        alpha = learner.gates(task).alpha
        assert alpha is not None
        norm = torch.stack([m.square().sum((-1, -2)) for m in kept]).sum(0).sqrt().mean(0)
    shape = (len(ARMS), S)
    return (
        near.view(*shape, T).cpu(),
        error.view(*shape, T).cpu(),
        early.view(shape).cpu(),
        alpha.mean((0, 2, 3)).view(shape).cpu(),
        norm.view(shape).cpu(),
    )
