"""Where does a small difference in a memory grow, and which cheap number tells?

Two memories that differ by 1e-10 read the same stream in float64, with random weights and gates; every 512
tokens the difference is measured and set back to 1e-10. Beside it stand numbers that a scan has at hand: of
the last memory layer's Gram matrix K_ij = sqrt(w_i c_i w_j c_j) a_i . a_j, with w the chunk's weights of
tokens (last row of G), a the layer's inputs and c the curvature of the loss (2, with layer norm 2 / std^2,
times the clip's factor), its trace, its Frobenius norm, the square of that over the trace (the mean
eigenvalue weighted by itself) and its largest eigenvalue; how far a chunk moves the memory; and the gain that
the engine reports (kernels/health.py: the weighted mean, over what stays where nothing is learned).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from mnemosyne.kernels import chunk, health, network
from mnemosyne.kernels.gates import Decays, Gates, decays
from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule
from mnemosyne.training.experiments import tasks
from mnemosyne.training.experiments.report import Line, Panel, Table

APART = 1e-10
GROWS = 0.3
"""Decades in one window above which a difference counts as growing."""
WINDOW = 512
SHOWN = -6.0
"""The forgetting of which every window is printed, alpha about 0.0025."""
NUMBERS = ("trace", "Frobenius", "Frobenius²/trace", "largest eigenvalue", "movement", "gain")
LIMITS = (0.5, 1.0, 1.5)
"""At which the gain is asked whether a window grows; by theory from 1 on."""


class Structure(NamedTuple):
    name: str
    norm: bool = True
    residual: bool = True
    momentum: bool = True
    clip: float | None = None
    depth: int = 2


STRUCTURES = (
    Structure("LN + residual, momentum"),
    Structure("LN + residual, no momentum", momentum=False),
    Structure("LN, no residual, momentum", residual=False),
    Structure("residual, no LN, momentum", norm=False),
    Structure("LN + residual, momentum, clip 1", clip=1.0),
    Structure("LN + residual, momentum, clip 10", clip=10.0),
    Structure("LN + residual, no momentum, clip 1", momentum=False, clip=1.0),
    Structure("LN + residual, momentum, depth 1", depth=1),
    Structure("LN + residual, momentum, depth 3", depth=3),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    d: int
    tokens: int
    chunk: int
    theta: tuple[float, ...]
    """theta is 0.05 sigmoid(normal) times one of these."""
    forget: tuple[float, ...]
    """alpha is sigmoid(normal + one of these)."""
    seeds: int


SETTINGS = {
    "tiny": Setting(d=8, tokens=1024, chunk=64, theta=(4e-3, 1.0), forget=(-6.0, -4.0), seeds=1),
    "small": Setting(
        d=64, tokens=4096, chunk=64, theta=(4e-4, 4e-3, 4e-2, 1.0), forget=(-4.0, -6.0, -8.0, -10.0), seeds=2
    ),
    "full": Setting(
        d=64,
        tokens=16384,
        chunk=64,
        theta=(4e-5, 4e-4, 1e-3, 4e-3, 1e-2, 4e-2, 0.2, 1.0),
        forget=(-3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -10.0),
        seeds=4,
    ),
}


def run(setting: Setting, device: torch.device) -> tuple[list[Table], list[Panel]]:
    grid = list(itertools.product(setting.theta, setting.forget))
    growth, numbers, rows = [], [], []
    panels, lines = [], []
    for structure in STRUCTURES:
        grew, seen = followed(structure, grid, setting, device)  # [seeds, grid, windows (, numbers)]
        growth.append(grew.flatten())
        numbers.append(seen.flatten(0, 2))
        total = grew.nan_to_num(0.0).cumsum(-1)[0]
        for place, (theta, forget) in enumerate(grid):
            if forget == SHOWN:
                cells = " ".join(f"{x:+.1f}" for x in total[place].tolist()[:8])
                rows.append([structure.name, f"{theta:g}", cells])
        places = [grid.index((theta, SHOWN)) for theta in setting.theta]
        if structure.name in (STRUCTURES[0].name, STRUCTURES[1].name, STRUCTURES[4].name):
            lines = [
                Line(
                    label=f"θ x {grid[place][0]:g}",
                    x=[WINDOW * (i + 1) for i in range(total.shape[1])],
                    y=total[place].tolist(),
                )
                for place in places
            ]
            panels.append(Panel(title=structure.name, x="tokens", y="decades grown (α 0.0025)", lines=lines))
    columns = ["memory", "theta x", f"decades grown after each of the first {WINDOW}s of tokens, summed up"]
    tables = [
        Table(title="What becomes of a difference of 1e-10 (alpha about 0.0025)", columns=columns, rows=rows)
    ]
    table, thresholds = told(growth, numbers)
    points = [
        Line(
            label=structure.name,
            x=seen[::3, -1].clamp(1e-3, 1e3).tolist(),
            y=grew[::3].clamp(-1, 10).tolist(),
            joined=False,
        )
        for structure, grew, seen in zip(STRUCTURES, growth, numbers, strict=True)
    ]
    panels.append(
        Panel(
            title="a third of all windows", x="gain", y="decades in 512 tokens", lines=points, logarithmic="x"
        )
    )
    return [*tables, table, thresholds], panels


def followed(
    structure: Structure, grid: list[tuple[float, float]], setting: Setting, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Decades by which the difference grew in each window `[seeds, grid, windows]`, and the NUMBERS' means
    over the window's chunks `[seeds, grid, windows, 6]`; nan where the memory itself is gone or infinite."""
    d, T, L = setting.d, setting.tokens, setting.chunk
    g, n = tasks.generator(8, device), len(grid)
    architecture = Architecture(residual=structure.residual, norm=structure.norm)
    rule = make_rule(
        "titans", depth=structure.depth, architecture=architecture, clip=structure.clip, options={}
    )
    widths = [d, *[2 * d] * (structure.depth - 1), d]

    def normal(*shape: int) -> Tensor:
        return tasks.normal(g, *shape).double()

    S = setting.seeds
    k, v = network.unit(normal(S, T, d)), 0.5 * normal(S, T, d)
    scale = torch.tensor([theta for theta, _ in grid], device=device, dtype=torch.float64)
    shift = torch.tensor([forget for _, forget in grid], device=device, dtype=torch.float64)
    theta = 0.05 * torch.sigmoid(normal(S, 1, T)) * scale[:, None]
    alpha = torch.sigmoid(normal(S, n, T) + shift[:, None])
    eta = torch.sigmoid(normal(S, 1, T) + 1).expand(S, n, T) * structure.momentum
    # Sessions are the seeds and the grid, heads the two memories.
    gates = Gates(
        *(x.reshape(S * n, 1, 1, T).expand(S * n, 2, structure.depth, T) for x in (theta, eta, alpha))
    )
    memory = []
    for inn, out in zip(widths, widths[1:], strict=False):
        start = (normal(S, 1, 1, out, inn) / inn**0.5).expand(S, n, 2, out, inn).clone()
        start[:, :, 1] *= 1 + APART * normal(S, 1, out, inn)
        memory.append(start.flatten(0, 1))
    past = [torch.zeros_like(m) for m in memory]
    grew, seen = [], []
    for first in range(0, T, WINDOW):
        part = slice(first, first + WINDOW)
        keys, values = (
            x[:, None, None, part].expand(S, n, 2, -1, d).reshape(S * n, 2, -1, L, d) for x in (k, v)
        )
        decay = decays(gates.map(itemgetter((..., part))).chunks(L))
        before = distance(memory)
        scanned = chunk.scan(keys, values, None, decay, memory, past, rule)
        after = distance(scanned.memory)
        grew.append((after / before).log10())
        seen.append(told_by(scanned, decay, rule))
        back = (APART / after)[:, None, None]
        memory, past = (
            [torch.stack([m[:, 0], m[:, 0] + (m[:, 1] - m[:, 0]) * back], 1) for m in matrices]
            for matrices in (scanned.memory, scanned.momentum)
        )
    growth = torch.stack(grew, -1)
    growth = torch.where(growth.isfinite(), growth, torch.nan)
    return growth.view(S, n, -1).cpu(), torch.stack(seen, 1).view(S, n, len(grew), -1).cpu()


def distance(memory: list[Tensor]) -> Tensor:
    """Of the two memories, relative to their size, all layers together; `[B]`."""
    parts = [(m[:, 1] - m[:, 0]).square().sum((-1, -2)) / m[:, 0].square().sum((-1, -2)) for m in memory]
    return torch.stack(parts).sum(0).sqrt()


def told_by(scanned: chunk.Scan, decay: Decays, rule: MemoryRule) -> Tensor:
    """NUMBERS `[B, 6]` of the first memory, means over chunks."""
    a = scanned.inputs[-1][:, 0]
    curvature = torch.full_like(a[..., 0], 2.0)
    if scanned.rstd is not None:
        curvature = 2 * scanned.rstd[:, 0].square()
    if rule.algorithm.clip is not None:
        curvature = curvature * (rule.algorithm.clip / scanned.norms[:, 0, -1].clamp(min=1e-30)).clamp(max=1)
    rows = (decay.G[:, 0, -1, :, -1] * curvature).sqrt().unsqueeze(-1) * a
    gram = (rows @ rows.transpose(-1, -2)).nan_to_num(0.0, 1e12, -1e12).clamp(-1e12, 1e12)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = gram.square().sum((-1, -2))
    ends = [
        torch.cat([starts[:, 0, :, 0], m[:, :1]], 1)
        for starts, m in zip(scanned.starts, scanned.memory, strict=True)
    ]
    moved = sum((m[:, 1:] - m[:, :-1]).square().sum((-1, -2)) for m in ends)
    size = sum(m[:, :-1].square().sum((-1, -2)) for m in ends)
    assert isinstance(moved, Tensor) and isinstance(size, Tensor)
    largest = torch.linalg.eigvalsh(gram)[..., -1]
    numbers = [trace, square.sqrt(), square / trace.clamp(min=1e-300), largest, (moved / size).sqrt()]
    numbers.append(health.gain(scanned, decay, rule)[:, 0].to(a.dtype))
    return torch.stack(numbers, -1).mean(1)


def area(number: Tensor, grows: Tensor) -> float:
    """Chance that the number is larger in a window that grows than in one that doesn't."""
    order = number.argsort(stable=True)
    rank = torch.empty_like(number)
    rank[order] = torch.arange(1, len(number) + 1, dtype=number.dtype)
    ones, zeros = int(grows.sum()), int((~grows).sum())
    return (
        float((rank[grows].sum() - ones * (ones + 1) / 2) / (ones * zeros))
        if ones and zeros
        else float("nan")
    )


def shown(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.2f}"


def told(growth: list[Tensor], numbers: list[Tensor]) -> tuple[Table, Table]:
    """How well each number separates windows that grow from others; and the gain at fixed values."""
    rows, at = [], []
    groups = [(s.name, g, x) for s, g, x in zip(STRUCTURES, growth, numbers, strict=True)]
    for name, grew, seen in [("all", torch.cat(growth), torch.cat(numbers)), *groups]:
        known = grew.isfinite() & seen.isfinite().all(-1)
        grows, seen = grew[known] > GROWS, seen[known]
        counts = [name, str(len(grows)), str(int(grows.sum()))]
        rows.append([*counts, *(shown(area(seen[:, i], grows)) for i in range(len(NUMBERS)))])
        cells = []
        for limit in LIMITS:
            over = seen[:, -1] > limit
            caught, quiet = (over & grows).sum() / grows.sum(), (~over & ~grows).sum() / (~grows).sum()
            cells.append(f"{shown(float(caught))} / {shown(float(quiet))}")
        at.append([*counts, *cells])
    columns = ["memory", "windows", "growing", *NUMBERS]
    title = (
        "Chance that the number is larger in a window that grows (by over 10^0.3) than in one that doesn't"
    )
    columns2 = ["memory", "windows", "growing", *(f"over {limit:g}" for limit in LIMITS)]
    title2 = "The gain: share of growing windows caught / of quiet ones left alone"
    return Table(title=title, columns=columns, rows=rows), Table(title=title2, columns=columns2, rows=at)
