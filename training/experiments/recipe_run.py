"""One run of the recipe: a model made from its settings, trained on rows that are there, and judged. Owns the
loop and what is measured; knows neither the other runs nor any file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.model import Titans
from mnemosyne.training.feed import Arrays
from mnemosyne.training.settings import Settings
from mnemosyne.training.step import Step
from mnemosyne.training.train import build, learning_rate

READINGS = 20
"""Points of a run's curve; its speed is measured from the first of them on, when everything is compiled."""


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """A training run's settings, and what the trainer itself has no setting for."""

    memory: Mapping[str, Any] = field(default_factory=dict)
    """Of ``MemoryConfig``, by name."""
    alike: bool = True
    """False: queries start from a projection of their own instead of the keys'."""

    @property
    def model(self) -> ModelConfig:
        config = super().model
        return replace(config, memory=replace(config.memory, **self.memory))


@dataclass
class Judged:
    """What a model made of one set of rows. An answer is right when all of its tokens are; one that is far
    lies beyond what attention reaches."""

    far: int = 0
    right_far: int = 0
    text: float = 0.0
    """Nats a token of running text."""
    written: float = 0.0
    """Share of the background's tokens that are stored at all; here and below, head by head, by the layers
    above the first where there are any."""
    theta: float = 0.0
    """theta at the values of facts, as a share of its maximum."""
    finite: bool = True


def run(
    settings: RunSettings,
    device: torch.device,
    rows: Sequence[Arrays],
    judged: Sequence[Sequence[Arrays]],
    far: int,
) -> dict[str, Any]:
    """Train on ``rows``, a batch a step, then judge by every set of ``judged``; the numbers as plain data."""
    model = build(settings, device)
    if not settings.alike:
        part(model)
    trained = train(model, settings, rows)
    return trained | {"judged": [vars(judge(model, batches, far)) for batches in judged]}


@torch.no_grad()
def part(model: Titans) -> None:
    """Draw the queries' projections anew (MAG, MAL, LMM: they are the first of the three streams)."""
    d = model.config.dim
    for block in model.blocks:
        weight = block.mixer.memory.project.weight
        weight[:d] = torch.randn_like(weight[:d]) / d**0.5


def train(model: Titans, settings: RunSettings, rows: Sequence[Arrays]) -> dict[str, Any]:
    """``curve``: accuracy on far answers while training; ``lost``: readings with a step whose loss wasn't
    finite; ``speed``: tokens a second, of the processor's time on a CPU, which others may use too."""
    step = Step(model, settings)
    every = max(1, len(rows) // READINGS)
    curve: list[float] = []
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    lost, begun = 0, clock()
    for first in range(0, len(rows), every):
        for i, batch in enumerate(rows[first : first + every], first):
            step(batch, learning_rate(settings, i, i / len(rows)))
        metrics = step.read()  # waits for the device
        curve.append(metrics["far"])
        lost += not math.isfinite(metrics["loss"])
        if first == 0:
            begun = clock()
    seconds = clock() - begun
    tokens = sum(batch.tokens.size for batch in rows[every:])
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "a CPU"
    return {"device": device, "curve": curve, "lost": lost, "speed": tokens / seconds}


def judge(model: Titans, batches: Sequence[Arrays], far: int) -> Judged:
    """Read the batches from fresh sessions, with gradients on though none is taken: so the same kernels
    compute as in training."""
    model.eval()
    found = Judged()
    sums = np.zeros(6)
    for batch in batches:
        tokens, fact, at, target = (
            torch.from_numpy(np.ascontiguousarray(x)).to(model.device)
            for x in (batch.tokens.astype(int), batch.fact, batch.at, batch.target)
        )
        hidden, gates = model(tokens)[:2]
        with torch.no_grad():
            picked = hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            logits = model.logits(picked)
            entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            text = torch.from_numpy(batch.text).to(model.device)
            top = model.config.memory.theta_max
            theta = torch.stack([g.theta for g in gates[1:] or gates]).mean((0, 2, 3)) / top
            stored = torch.stack([(g.theta > 0).float() for g in gates[1:] or gates]).mean((0, 2, 3))
            noise, value = (fact == 0).float(), (fact == 2).float()
            parts = [(entropy.view_as(text) * text).sum(), text.sum(), (stored * noise).sum(), noise.sum()]
            sums += torch.stack([*parts, (theta * value).sum(), value.sum()]).double().cpu().numpy()
            found.finite = found.finite and bool(logits.isfinite().all())
            hit = (logits.argmax(-1) == target).cpu().numpy()
        for row, place in told(batch):
            if batch.distance[row, place[0]] > far:
                found.far += 1
                found.right_far += bool(hit[row, place].all())
    found.text, found.written, found.theta = (float(a / max(b, 1.0)) for a, b in sums.reshape(3, 2))
    return found


def told(batch: Arrays) -> list[tuple[int, NDArray[np.intp]]]:
    """(row, columns of its tokens among the targets) of every answer."""
    found = []
    for row, (at, answer) in enumerate(zip(batch.at, batch.answer, strict=True)):
        columns = np.flatnonzero(answer > 0)
        cuts = np.flatnonzero(np.diff(at[columns]) != 1) + 1
        found += [(row, piece) for piece in np.split(columns, cuts) if len(piece)]
    return found
