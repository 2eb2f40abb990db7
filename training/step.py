"""One training step: the losses, the gradient, the update. On a GPU the whole of it is one CUDA graph per
shape, for small models are bound by kernel launches. Knows no curriculum and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.engine.memory import State
from mnemosyne.engine.model import Titans
from mnemosyne.training.babilong.tasks import TASKS
from mnemosyne.training.feed import Arrays, Before
from mnemosyne.training.history import History
from mnemosyne.training.settings import Settings

OPEN = 0.01
"""Where the write penalty bends: a gate of this share of its maximum costs a tenth of a gate half open."""
SURE = 1e-3
"""Share by which a gate is taken to fall short of its maximum, so that one fully open has a finite cost."""


WRITE = 0.3
"""Share of theta's maximum that a fact's value is taught to be written with, at the least."""


def write_penalty(gate: Tensor) -> Tensor:
    """Cost of gates as shares of their maximum: 0 at 0, 1.5 at a half, 7.9 fully open.

    Logarithmic at both ends, where a sigmoid has nearly no slope left: near 0 the pull towards 0 stays
    strong, and near 1, where the few tokens are that a gate takes for facts with certainty, cross entropy's
    stays whole.
    """
    shut = torch.log1p(gate / OPEN) / math.log1p(1 / OPEN)
    return shut - torch.log1p(-(1 - SURE) * gate)


def lessons(layers: int, free: str) -> tuple[list[bool], list[bool]]:
    """Which layers are charged for what they write outside facts, and which are taught to write facts.

    The gates of the first see one token and no context, so all that they could tell of a fact is a word; what
    a free one has learned of running text moves the keys of all layers above it, away from those that facts
    were written under. The last moves none, and with it free the first is shut (``deepen.shut``).
    """
    every = range(layers)
    if layers == 1 or free == "none":
        return [True] * layers, [True] * layers
    spared = 0 if free == "first" else layers - 1
    return [i != spared for i in every], [0 < i != spared for i in every]


def metric_names(layers: int) -> list[str]:
    names = ["loss", "answer", "text", "penalty", "closed", "grad", "right_far", "far", "right_near", "near"]
    for kind in ("written_noise", "theta_noise", "written_fact", "theta_fact", "forget_noise"):
        names += [f"{kind}_{i}" for i in range(layers)]
    return names + [f"{kind}_{task}" for kind in ("right", "asked") for task in range(TASKS + 1)]


class Step:
    """``step(batch, lr)`` changes the model; ``read()`` gives the metrics' means since the last one."""

    def __init__(self, model: Titans, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.device = model.device
        decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and n.endswith(("weight",))]
        chosen = {id(p) for p in decayed}
        plain = [p for p in model.parameters() if id(p) not in chosen]
        # A MAC asks its device whether a segment has ended, which no graph can hold.
        self._graphed = self.device.type == "cuda" and model.config.variant != "mac"
        self.lr = torch.tensor(0.0, device=self.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.lr if self._graphed else 0.0,
            betas=(0.9, 0.95),
            capturable=self._graphed,
        )
        self._charged, self._taught = (
            torch.tensor(one, device=self.device).view(-1, 1, 1, 1, 1)
            for one in lessons(settings.layers, settings.free)
        )
        self.names = metric_names(settings.layers)
        self._sum = torch.zeros(len(self.names), device=self.device)
        self._count = 0
        self._graphs: dict[tuple[int, ...], Callable[[], Tensor]] = {}
        self._inputs: list[Tensor] = []
        self._history: History | None = None

    def __call__(self, batch: Arrays, lr: float, before: Before | None = None) -> None:
        shape = (*batch.tokens.shape, batch.at.shape[1], before is not None)
        parts = (batch,) if before is None else (batch, before)
        given = [array for part in parts for array in part._replace(tokens=part.tokens.astype(int))]
        arrays = [torch.from_numpy(np.ascontiguousarray(array)) for array in given]
        if shape not in self._graphs:
            self._graphs.clear()  # one shape at a time: the last one's memory is given back
            self._inputs = [a.to(self.device) for a in arrays]
            self._history = None if before is None else History(self.model, len(batch.tokens))
            self._graphs[shape] = self._capture() if self._graphed else self._compute
        for mine, array in zip(self._inputs, arrays, strict=True):
            mine.copy_(array)
        self.lr.fill_(lr)
        for group in self.optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = lr
        self._sum += self._graphs[shape]()
        self._count += 1

    def read(self) -> dict[str, float]:
        """Means since the last call; where they were asked, ``far``, ``near`` and every task become
        accuracies."""
        values = dict(zip(self.names, (self._sum / max(1, self._count)).tolist(), strict=True))
        self._sum.zero_()
        self._count = 0
        for kind in ("far", "near"):
            right, asked = values.pop(f"right_{kind}"), values.pop(kind)
            if asked:
                values[kind] = right / asked
        for task in range(TASKS + 1):
            right, asked = values.pop(f"right_{task}"), values.pop(f"asked_{task}")
            if asked:
                values[f"qa{task}" if task else "invented"] = right / asked
        return values

    def _capture(self) -> Callable[[], Tensor]:
        # The warm-up runs touch nothing but Adam's averages, with real gradients, and what was read before.
        self.lr.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._compute()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _compute(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        rows, before = self._inputs[: len(Arrays._fields)], self._inputs[len(Arrays._fields) :]
        layers = None
        if self._history is not None:
            read, restarts, begins = before
            self._history.read(read, restarts)
            layers = self._history.layers(begins)
        loss, metrics = self.losses(*rows, layers=layers)
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad = nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        for p in parameters:
            assert p.grad is not None
            torch.nan_to_num_(p.grad, 0.0, 0.0, 0.0)  # a step that overflowed changes nothing
        self.optimizer.step()
        return torch.cat([metrics[:5], grad.detach().view(1).nan_to_num(-1.0), metrics[5:]])

    def losses(
        self,
        tokens: Tensor,
        fact: Tensor,
        at: Tensor,
        target: Tensor,
        answer: Tensor,
        text: Tensor,
        distance: Tensor,
        task: Tensor,
        *,
        layers: list[State] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the metrics but for the gradient's norm; ``layers`` as ``Titans.forward`` has it."""
        s, memory = self.settings, self.model.config.memory
        hidden, gates, _ = self.model(tokens, layers)
        picked = hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        logits = self.model.logits(picked)
        entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(answer)
        answer_loss = (entropy * answer).sum() / answer.sum().clamp(min=1)
        text_loss = (entropy * text).sum() / text.sum().clamp(min=1)
        theta = torch.stack([g.theta for g in gates]) / memory.theta_max  # [layers, B, H, D, T]
        # A rule that never forgets pays nothing for it.
        forget = [torch.zeros_like(g.theta) if g.alpha is None else g.alpha for g in gates]
        alpha = torch.stack(forget) / (memory.alpha_max or 1.0)
        inside = ((fact > 0)[:, None, None] & self._taught).float()
        noise = (fact == 0)[:, None, None].float().expand_as(inside)
        outside = noise * self._charged
        value = (fact == 2)[:, None, None].float() * self._taught
        cells = theta.shape[2] * theta.shape[3]
        cost = ((write_penalty(theta) + write_penalty(alpha)) * outside).sum() / (outside.sum() * cells)
        closed = (torch.relu(WRITE - theta) * value).sum() / (WRITE * cells * value.sum().clamp(min=1))
        loss = answer_loss + s.text_weight * text_loss + s.penalty * cost + s.teach * closed
        with torch.no_grad():
            right = (logits.argmax(-1) == target).float() * answer
            far = (distance > s.reach).float() * answer

            def share(x: Tensor, where: Tensor) -> Tensor:
                return (x * where).mean((2, 3)).sum((1, 2)) / where.sum((1, 2, 3, 4)).clamp(min=1)

            numbers = torch.arange(TASKS + 1, device=task.device)
            of_task = (task.unsqueeze(-1) == numbers).float()
            counts = [(right * far).sum(), far.sum(), (right * (answer - far)).sum(), (answer - far).sum()]
            metrics = torch.cat(
                [
                    torch.stack(
                        [*(x.detach() for x in (loss, answer_loss, text_loss, cost, closed)), *counts]
                    ),
                    share((theta > 0).float(), noise),
                    share(theta, noise),
                    share((theta > 0).float(), inside),
                    share(theta, inside),
                    share((alpha > 0).float(), noise),
                    (of_task * right.unsqueeze(-1)).sum((0, 1)),
                    (of_task * answer.unsqueeze(-1)).sum((0, 1)),
                ]
            )
        return loss, metrics
