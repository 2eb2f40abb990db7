"""Does Yaad suffer less from outliers than the square loss?

Claim: MIRAS 5 (the Huber loss is robust to extreme tokens). One memory of depth 2 under four rules: the
square loss, the square loss with clipped gradients, and Yaad with a threshold that is learned or fixed. A
share of the stored values is grossly wrong; the clean pairs are asked for. Each rule is trained once on clean
streams and once on streams with outliers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.kernels.rules.rule import MemoryRule, Square
from mnemosyne.training.experiments import measures, tasks
from mnemosyne.training.experiments.learner import PLAIN, Learner, Task, relative_error, train
from mnemosyne.training.experiments.report import Line, Panel, Table

TRAINED = ("clean streams", "streams with outliers")
SHARES, SIZES = (0.0, 0.125, 0.25), (1.0, 10.0, 100.0)
"""Share of the values that are wrong, and their norm; a right one has about 1."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    d: int
    pairs: int
    chunk: int
    seeds: int
    batch: int
    steps: int
    judged: int


SETTINGS = {
    "tiny": Setting(d=8, pairs=8, chunk=4, seeds=2, batch=2, steps=3, judged=4),
    "small": Setting(d=16, pairs=32, chunk=8, seeds=4, batch=8, steps=250, judged=64),
    "full": Setting(d=32, pairs=64, chunk=8, seeds=8, batch=32, steps=1500, judged=256),
}


def rules() -> dict[str, tuple[MemoryRule, float | None]]:
    """Name -> rule, and its fixed threshold."""
    yaad = make_rule("yaad", depth=2, architecture=PLAIN, clip=None, options={})
    square = dataclasses.replace(yaad, bias=Square())
    clipped = dataclasses.replace(square, algorithm=dataclasses.replace(square.algorithm, clip=1.0))
    return {
        "square": (square, None),
        "square, clip 1": (clipped, None),
        "yaad, threshold learned": (yaad, None),
        "yaad, threshold 1": (yaad, 1.0),
    }


def draw(
    seed: int, setting: Setting, wrong: list[tuple[float, float]], batch: int, device: torch.device
) -> tuple[Task, Tensor]:
    """Pairs of which ``wrong`` says, per member, which share has wrong values, and of which norm. Asked for
    are as many right ones as the largest share leaves; their places come too, `[batch, H, Q]`."""
    g = tasks.generator(seed, device)
    shape = (batch, len(wrong), setting.pairs, setting.d)
    k, v = tasks.keys(g, *shape), tasks.normal(g, *shape) / setting.d**0.5
    order = torch.rand(shape[:3], generator=g, device=device).argsort(-1)
    count = torch.tensor([round(share * setting.pairs) for share, _ in wrong], device=device)[:, None]
    size = torch.tensor([size for _, size in wrong], device=device)[:, None, None]
    bad = (order < count)[..., None]  # order is a permutation: exactly ``count`` of its entries
    stored = torch.where(bad, tasks.keys(g, *shape) * size, v)
    asked = order.argsort(-1)[..., -(setting.pairs - round(max(SHARES) * setting.pairs)) :]
    spread = asked[..., None].expand(-1, -1, -1, setting.d)
    return Task(k, stored, k.gather(2, spread), v.gather(2, spread)), asked


def run(setting: Setting, device: torch.device) -> tuple[list[Table], list[Panel]]:
    found = {name: measured(rule, fixed, setting, device) for name, (rule, fixed) in rules().items()}
    grid = [(SHARES[0], SIZES[0])] + [(share, size) for size in SIZES for share in SHARES[1:]]
    names = ["no outliers"] + [f"{share:.1%} of size {size:g}" for share, size in grid[1:]]
    tables, panels = [], []
    for way, title in enumerate(TRAINED):
        rows = [
            [name, *(measures.percent(near[way, i]) for i in range(len(grid)))]
            for name, (near, _, _) in found.items()
        ]
        tables.append(
            Table(title=f"Trained on {title}: right value nearest, %", columns=["rule", *names], rows=rows)
        )
        rows = [
            [
                name,
                *(measures.shown(error[way, i]) for i in range(len(grid))),
                limit[way] if limit else "none",
            ]
            for name, (_, error, limit) in found.items()
        ]
        head = f"Trained on {title}: median relative error of the clean pairs"
        tables.append(Table(title=head, columns=["rule", *names, "threshold"], rows=rows))
        lines = []
        for name, (near, _, _) in found.items():
            places = [0, *(i for i, cell in enumerate(grid) if cell[0] == SHARES[-1])]
            mean, half = zip(*(measures.interval(100 * near[way, i]) for i in places), strict=True)
            lines.append(Line(label=name, x=[0.1, *SIZES], y=mean, half=half))
        head = f"{SHARES[-1]:.0%} outliers, trained on {title}"
        panels.append(
            Panel(
                title=head,
                x="size of outliers (0.1: none)",
                y="right value nearest, %",
                lines=lines,
                logarithmic="x",
            )
        )
    return tables, panels


def measured(
    rule: MemoryRule, fixed: float | None, setting: Setting, device: torch.device
) -> tuple[Tensor, Tensor, list[str] | None]:
    """Recall and median error `[trained on, grid, seeds]`, and the threshold by what was trained on."""
    S = setting.seeds
    harmed = [(share, size) for share in SHARES[1:] for size in SIZES]
    members = 2 * S
    d = setting.d
    learner = Learner(rule, [d, 4 * d, d], members, seed=4, threshold=fixed).to(device)

    def drawn(i: int) -> Task:
        wrong = [(0.0, 1.0)] * S + [harmed[i % len(harmed)]] * S
        return draw(i, setting, wrong, setting.batch, device)[0]

    train(learner, drawn, setting.steps, setting.chunk)
    near, error = [], []
    with torch.no_grad():
        for share, size in [(SHARES[0], SIZES[0])] + [(s, z) for z in SIZES for s in SHARES[1:]]:
            wrong = [(share, size)] * members
            task, asked = draw(10**6, setting, wrong, setting.judged, device)
            answered = learner(task, setting.chunk).nan_to_num(1e9, 1e9, -1e9)
            near.append(
                measures.nearest(answered, task.answers, torch.arange(asked.shape[2], device=device)).mean(
                    (0, 2)
                )
            )
            error.append(relative_error(answered, task.answers).movedim(1, 0).flatten(1).median(1).values)
        limit = None
        if rule.bias.threshold:
            values = torch.nn.functional.softplus(learner.threshold).view(2, S).cpu()
            limit = [measures.shown(value) for value in values]
    shape = (-1, 2, S)
    return (
        torch.stack(near).view(shape).transpose(0, 1).cpu(),
        torch.stack(error).view(shape).transpose(0, 1).cpu(),
        limit,
    )
