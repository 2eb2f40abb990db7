"""Does a deeper memory fit more? Depth 1 to 4 at equal parameters, on pairs without and with a structure.

Claim: Titans 5.5 and figure 7 (deeper is better), appendix F (not without gates of its own for each layer).
Two families: as many parameters as one d x d matrix, where deeper means a narrow middle, and eight times as
many (the paper's expansion of 4), where the linear memory spends them on random SiLU features of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.kernels.network import unit
from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.training.experiments import measures, tasks
from mnemosyne.training.experiments.learner import PLAIN, Learner, Task, relative_error, train
from mnemosyne.training.experiments.report import Line, Panel, Table

KINDS = ("random pairs", "pairs of a tanh network")


@dataclass(frozen=True, kw_only=True)
class Setting:
    d: int
    loads: tuple[int, ...]
    chunk: int
    seeds: int
    batch: int
    steps: int
    judged: int
    """Streams a member is judged on."""
    teacher: int = 4
    """Hidden units of the tanh network."""


SETTINGS = {
    "tiny": Setting(d=8, loads=(4, 8), chunk=4, seeds=2, batch=2, steps=4, judged=4),
    "small": Setting(d=16, loads=(8, 16, 32, 64), chunk=8, seeds=4, batch=8, steps=300, judged=32),
    "full": Setting(d=32, loads=(16, 32, 64, 128, 256), chunk=8, seeds=8, batch=32, steps=1500, judged=128),
}


def hidden_width(depth: int, d: int, parameters: int) -> int:
    """Width of the hidden layers at which a memory of ``depth`` has about ``parameters``: the root of
    2 d h + (depth - 2) h^2."""
    if depth == 2:
        return round(parameters / (2 * d))
    n = depth - 2
    return round(((d * d + n * parameters) ** 0.5 - d) / n)


def memories(d: int) -> dict[str, list[tuple[str, list[int], int]]]:
    """Family -> (name, layer sizes, parameters); the padding of a wide linear one isn't counted."""
    families = {}
    for family, budget in (("d² parameters", d * d), ("8 d² parameters", 8 * d * d)):
        wide = budget // d
        name = "linear" if wide == d else f"linear, {wide} SiLU features"
        found = [(name, [wide, wide], wide * d)]
        for depth in (2, 3, 4):
            h = hidden_width(depth, d, budget)
            widths = [d, *[h] * (depth - 1), d]
            count = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
            found.append((f"depth {depth}, hidden {h}", widths, count))
        families[family] = found
    return families


def draw(seed: int, setting: Setting, kinds: list[int], pairs: int, batch: int, device: torch.device) -> Task:
    """``kinds`` gives each member its kind of pair."""
    g = tasks.generator(seed, device)
    shape = (batch, len(kinds), pairs, setting.d)
    x = tasks.keys(g, *shape)
    structured = torch.tensor(kinds, device=device)[None, :, None, None] == 1
    v = torch.where(structured, tasks.teacher(g, x, setting.teacher), tasks.normal(g, *shape))
    v = v / setting.d**0.5
    return Task(x, v, x, v)


def widened(task: Task, wide: int, device: torch.device) -> Task:
    """For one matrix of ``wide`` columns: SiLU features of the keys, and values with zeros behind them, so
    that the rows beyond d stay what they are and count for nothing."""
    d = task.keys.shape[-1]
    if wide == d:
        return task
    mix = tasks.normal(tasks.generator(11, device), d, wide)
    x = unit(F.silu(task.keys @ mix * 2))
    v = F.pad(task.values, (0, wide - d))
    return Task(x, v, x, v)


def run(setting: Setting, device: torch.device) -> tuple[list[Table], list[Panel]]:
    tables, panels, gates = [], [], []
    for family, found in memories(setting.d).items():
        lines: dict[str, list[Line]] = {kind: [] for kind in KINDS}
        rows: dict[str, list[list[str]]] = {kind: [] for kind in KINDS}
        for name, widths, count in found:
            recall, error = measured(widths, setting, device)
            for kind, title in enumerate(KINDS):
                near = recall[:, 0, kind]
                cells = [measures.percent(r) for r in near]
                last = [measures.shown(e) for e in error[:, 0, kind]]
                rows[title].append([name, str(count), *cells, last[0], last[-1]])
                mean, half = zip(*(measures.interval(100 * r) for r in near), strict=True)
                lines[title].append(Line(label=name, x=setting.loads, y=mean, half=half))
                if len(widths) > 2:
                    middle = len(setting.loads) // 2
                    pair = [
                        cell
                        for shared in (0, 1)
                        for cell in (
                            measures.percent(recall[middle, shared, kind]),
                            measures.shown(error[middle, shared, kind]),
                        )
                    ]
                    gates.append([f"{name} ({count})", title, *pair])
        columns = ["memory", "parameters", *(f"{n} pairs" for n in setting.loads)]
        columns += [f"error, {n} pairs" for n in (setting.loads[0], setting.loads[-1])]
        for title in KINDS:
            head = f"{title}, {family}: right value nearest, %"
            tables.append(Table(title=head, columns=columns, rows=rows[title]))
            panels.append(
                Panel(
                    title=f"{title}, {family}",
                    x="stored pairs",
                    y="right value nearest, %",
                    lines=lines[title],
                    logarithmic="x",
                )
            )
    middle = setting.loads[len(setting.loads) // 2]
    columns = ["memory (parameters)", "pairs", "each layer's own: %", "error", "one for all: %", "error"]
    title = f"Gates of each layer's own, or one for all layers ({middle} pairs)"
    tables.append(Table(title=title, columns=columns, rows=gates))
    return tables, panels


@torch.no_grad()
def judged(learner: Learner, task: Task, setting: Setting) -> tuple[Tensor, Tensor]:
    """Share of nearest values that are right, and relative error, per member."""
    answered = learner(task, setting.chunk)
    right = torch.arange(task.keys.shape[2], device=task.keys.device)
    near = measures.nearest(answered, task.values, right)
    return near.mean((0, 2)), relative_error(answered, task.answers).mean((0, 2))


def measured(widths: list[int], setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """Recall and error `[loads, shared, kind, seeds]` after training; ``shared`` 0 for gates of each layer's
    own and 1 for one gate (depth 1 has no difference, and only 0)."""
    ways = 1 if len(widths) == 2 else 2
    S = setting.seeds
    kinds = [kind for _ in range(ways) for kind in (0, 1) for _ in range(S)]
    shared = [way == 1 for way in range(ways) for _ in range(2 * S)]
    rule = make_rule("titans", depth=len(widths) - 1, architecture=PLAIN, clip=None, options={})
    learner = Learner(rule, widths, len(kinds), seed=1, shared=shared).to(device)
    if len(widths) == 2:
        with torch.no_grad():
            learner.initial[0][:, setting.d :] = 0  # the padding of a wide one says and learns nothing

    def drawn(seed: int, pairs: int, batch: int) -> Task:
        return widened(draw(seed, setting, kinds, pairs, batch, device), widths[0], device)

    loads = setting.loads
    train(learner, lambda i: drawn(i, loads[i % len(loads)], setting.batch), setting.steps, setting.chunk)
    found = [judged(learner, drawn(10**6 + n, n, setting.judged), setting) for n in loads]
    recall, error = (
        torch.stack(part).view(len(loads), ways, 2, S).cpu() for part in zip(*found, strict=True)
    )
    return recall, error
