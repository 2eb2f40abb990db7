"""A memory whose beginning is learned: M_0 and the gates, trained through the chunk form by an outer loop.

Owns the outer parameters and their training. Many members (seeds, and settings of equal shapes) stand side
by side as the kernels' heads, each with parameters and data of its own. Knows no task and no experiment.

Shapes: B streams, H members, T tokens, d the size of keys and values, D memory layers, f token features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.kernels import chunk, network
from mnemosyne.kernels.gates import Gates, decays, gate
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule

PLAIN = Architecture(residual=False, norm=False)
PAPER = Architecture()
"""With residual and layer norm: M(x) = x + LN(...)."""
EPSILON = 0.004
"""Where a gate closes for good (spec: below it the forward value is exactly 0)."""
BEGIN = {"theta": 0.1, "eta": 0.18, "alpha": 0.01}
"""Where the gates begin, if that is at most half of their largest values."""


GATE_PACE = 5.0
"""How much faster gates learn than M_0: they are logits, and few."""


class Task(NamedTuple):
    """Streams to be stored, and what is asked of the memory afterwards."""

    keys: Tensor
    """`[B, H, T, d]`."""
    values: Tensor
    """`[B, H, T, d]`."""
    queries: Tensor
    """`[B, H, Q, d]`."""
    answers: Tensor
    """`[B, H, Q, d]`."""
    features: Tensor | None = None
    """`[B, H, T, f]`: what the gates see of a token."""


class Limits(NamedTuple):
    """Largest value of each gate, for all members or for each `[H]`; 0 leaves the gate shut."""

    theta: float = 1.0
    eta: float | Sequence[float] = 0.9
    alpha: float | Sequence[float] = 0.5


OPEN = Limits()


class Learner(nn.Module):
    def __init__(
        self,
        rule: MemoryRule,
        widths: Sequence[int],
        members: int,
        *,
        seed: int,
        limits: Limits = OPEN,
        features: int = 0,
        seeing: Tensor | None = None,
        shared: Sequence[bool] | None = None,
        threshold: float | None = None,
    ) -> None:
        """``widths`` are the layer sizes from input to output. ``seeing`` `[H, f]` says which features each
        member's gates see (all), ``shared`` which members have one gate for all memory layers (none).
        ``threshold`` fixes that of a rule that takes one; without it one is learned, from 1 on."""
        super().__init__()
        self.rule, self.members = rule, members
        depth = len(widths) - 1
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = rule.initial(members, list(zip(widths[1:], widths, strict=False)))
        self.initial = nn.ParameterList(map(nn.Parameter, start))
        rows = [torch.as_tensor(limit, dtype=torch.float32).expand(members) for limit in limits]
        maxima = torch.stack(rows)
        begins = torch.tensor(list(BEGIN.values()))[:, None] / maxima.clamp(min=1e-9)
        self.bias = nn.Parameter(torch.logit(begins.clamp(max=0.5))[..., None].repeat(1, 1, depth))
        self.weight = nn.Parameter(0.1 * torch.randn(3, members, depth, features, generator=generator))
        begin = math.log(math.expm1(1.0 if threshold is None else threshold))
        self.threshold = nn.Parameter(torch.full((members,), begin), requires_grad=threshold is None)
        self.maxima: Tensor
        self.seeing: Tensor
        self.shared: Tensor
        self.register_buffer("maxima", maxima)
        self.register_buffer("seeing", torch.ones(members, features) if seeing is None else seeing)
        self.register_buffer("shared", torch.tensor(shared or [False] * members))

    def gates(self, task: Task) -> Gates:
        """`[B, H, D, T]`, the threshold `[B, H, T]`; without features the same at every token."""
        B, H, T, _ = task.keys.shape
        z = self.bias[:, None, :, :, None].expand(3, B, H, -1, T)
        if task.features is not None:
            weight = self.weight * self.seeing[:, None]
            z = z + torch.einsum("ghdf,bhtf->gbhdt", weight, task.features)
        z = torch.where(self.shared[:, None, None], z[:, :, :, :1], z)
        theta, eta, alpha = gate(z, 1.0, EPSILON) * self.maxima[:, None, :, None, None]
        limit = F.softplus(self.threshold)[None, :, None].expand(B, H, T)
        return Gates(
            theta,
            eta if self.rule.algorithm.momentum else None,
            alpha if self.rule.retention.forgets else None,
            limit if self.rule.bias.threshold else None,
        )

    def store(self, task: Task, length: int) -> chunk.Scan:
        """The whole stream in chunks of ``length`` tokens, from M_0."""
        B, H, T, d = task.keys.shape
        gates = self.gates(task).chunks(length)
        kept = [m.expand(B, *m.shape) for m in self.initial]
        past = [torch.zeros_like(m) for m in kept] if self.rule.algorithm.momentum else []
        k, v = (x.reshape(B, H, T // length, length, d) for x in (task.keys, task.values))
        return chunk.scan(k, v, gates.threshold, decays(gates), kept, past, self.rule)

    def retrieve(self, kept: Sequence[Tensor], queries: Tensor) -> Tensor:
        """M(q) `[B, H, Q, d]` of what is kept, `[B, H, out, in]` a memory layer."""
        B, H, Q, d = queries.shape
        flat = self.rule.weights([m.reshape(B * H, *m.shape[2:]) for m in kept])
        return network.retrieve(flat, queries.reshape(B * H, Q, d), self.rule.architecture).view(B, H, Q, d)

    def forward(self, task: Task, length: int) -> Tensor:
        """What is answered `[B, H, Q, d]` after the stream was stored."""
        return self.retrieve(self.store(task, length).memory, task.queries)


def relative_error(answered: Tensor, answers: Tensor) -> Tensor:
    """|M(q) - v|^2 / |v|^2, `[B, H, Q]`; 1 is what a memory that says nothing reaches."""
    return (answered - answers).square().sum(-1) / answers.square().sum(-1)


def train(
    learner: Learner,
    draw: Callable[[int], Task],
    steps: int,
    length: int,
    *,
    rate: float = 0.02,
    answer: Callable[[Learner, Task], Tensor] | None = None,
) -> list[float]:
    """Adam on the mean relative error, ``steps`` draws, rising over a tenth and falling as a cosine.

    Every member has its own gradient norm, cut at 1, so that none disturbs another; gates go GATE_PACE
    times as fast as ``rate``. ``answer`` replaces the store-and-ask of ``Learner.forward``. Returns the loss
    per step, the mean over members.
    """
    gates = [learner.bias, learner.weight, learner.threshold]
    groups = [{"params": [*learner.initial], "pace": 1.0}, {"params": gates, "pace": GATE_PACE}]
    optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.98))
    losses = []
    for step in range(steps):
        share = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * group["pace"] * min(10 * share, 0.5 + 0.5 * math.cos(math.pi * share))
        task = draw(step)
        answered = learner(task, length) if answer is None else answer(learner, task)
        # A logarithm, so that neither a member nor a stream that is far off drowns the others.
        loss = torch.log1p(relative_error(answered, task.answers)).mean((0, 2))
        optimizer.zero_grad()
        loss.sum().backward()
        clip(learner)
        optimizer.step()
        losses.append(float(loss.detach().mean()))
    return losses


def clip(learner: Learner) -> None:
    """Each member's gradient to norm at most 1, and nothing where it isn't finite."""
    gradients = []  # members first
    for name, parameter in learner.named_parameters():
        if parameter.grad is not None:
            torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)
            gradients.append(parameter.grad.movedim(1, 0) if name in ("bias", "weight") else parameter.grad)
    total = torch.stack([g.reshape(learner.members, -1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factor = (1 / total.clamp(min=1e-12)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))
