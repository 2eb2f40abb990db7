"""A million tokens of every rule, with gates and inputs at their worst: all values finite, none denormal.

Eight heads live through eight regimes side by side. What would diverge is refused by the configuration, and
that it would is shown here too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels import chunk as chunk_form
from mnemosyne.kernels import network
from mnemosyne.kernels.gates import Decays, Gates, decays
from mnemosyne.kernels.rules.registry import RULES, make_rule
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule

TOKENS, HEAD, CHUNK, CHUNKS = 1_000_000, 8, 64, 16
REGIMES = "slow none open repeated momentum bursts zeros huge".split()


class Stream:
    """Endless input of all regimes; gates come round again, keys and values never."""

    def __init__(self, rule: MemoryRule, depth: int, theta_max: float) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.rule = rule
        self.rounds = [self._gates(depth, theta_max) for _ in range(3)]
        self.decays = [decays(gates) for gates in self.rounds]
        self.at = 0

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(1, len(REGIMES), *shape, generator=self.generator)

    def _gates(self, depth: int, theta_max: float) -> Gates:
        shape = (depth, CHUNKS, CHUNK)
        theta, eta, alpha = (
            theta_max * self._uniform(*shape),
            self._uniform(*shape),
            0.01 * self._uniform(*shape),
        )
        at = {name: i for i, name in enumerate(REGIMES)}
        alpha[:, at["slow"]], alpha[:, at["none"]] = 1e-4, 0
        theta[:, at["open"]], eta[:, at["open"]] = theta_max, 1
        alpha[:, at["open"]] *= 100
        theta[:, at["repeated"]], eta[:, at["repeated"]] = theta_max, 0.9
        eta[:, at["momentum"]], alpha[:, at["momentum"]] = 0.999, 1e-3
        rare = self._uniform(*shape)[:, 0] < 0.02
        theta[:, at["bursts"]] *= rare
        alpha[:, at["bursts"]] *= rare
        return Gates(
            theta,
            eta if self.rule.algorithm.momentum else None,
            alpha if self.rule.retention.forgets else None,
            2 * self._uniform(CHUNKS, CHUNK) + 0.01 if self.rule.bias.threshold else None,
        )

    def next(self) -> tuple[Tensor, Tensor, Tensor | None, Decays]:
        """Keys, values, thresholds and decays of the next chunks."""
        shape = (1, len(REGIMES), CHUNKS, CHUNK, HEAD)
        k, v = torch.randn(2, *shape, generator=self.generator).unbind(0)
        at = {name: i for i, name in enumerate(REGIMES)}
        k[:, at["repeated"]], v[:, at["repeated"]] = 1, 1
        k[:, at["zeros"]] *= self._uniform(CHUNKS, CHUNK, 1)[:, 0] < 0.5
        v[:, at["huge"]] *= 1e3
        self.at = (self.at + 1) % len(self.rounds)
        return network.unit(k), v, self.rounds[self.at].threshold, self.decays[self.at]


def run(rule: MemoryRule, depth: int, theta_max: float, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Memory and momentum after ``tokens``, and what the last of them read."""
    torch.manual_seed(0)
    widths = [HEAD] + [2 * HEAD] * (depth - 1) + [HEAD]
    memory = [rule.retention.initial(1, len(REGIMES), widths[i + 1], widths[i]) for i in range(depth)]
    momentum = [torch.zeros_like(m) for m in memory] if rule.algorithm.momentum else []
    stream = Stream(rule, depth, theta_max)
    for _ in range(-(-tokens // (CHUNKS * CHUNK))):
        k, v, threshold, decay = stream.next()
        scanned = chunk_form.scan(k, v, threshold, decay, memory, momentum, rule)
        memory, momentum = scanned.memory, scanned.momentum
    return memory + momentum, chunk_form.read(k, decay, scanned, rule)


def cases() -> list[Any]:
    """Every rule, depth and form; all but one of each rule take long together and are marked slow."""
    made = []
    for name in RULES:
        matrix = "delta" in name
        for depth in (1,) if matrix else (1, 2, 3, 4):
            for norm, clip in ((False, 1.0),) if matrix else ((True, None), (False, 1.0)):
                first = matrix or (depth == 2 and norm)
                made.append(pytest.param(name, depth, norm, clip, marks=() if first else pytest.mark.slow))
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "depth", "norm", "clip"), cases())
def test_a_million_tokens_stay_finite(name, depth, norm, clip):
    architecture = Architecture(residual="delta" not in name, norm=norm)
    rule = make_rule(name, depth=depth, architecture=architecture, clip=clip, options={})
    kept, reads = run(rule, depth, min(0.5, rule.retention.theta_limit), TOKENS)
    assert torch.isfinite(reads).all()
    for matrix in kept:
        assert torch.isfinite(matrix).all()
        size = matrix.abs()
        assert ((size == 0) | (size >= torch.finfo(torch.float32).tiny)).all(), "denormal numbers are slow"


def test_what_is_refused_does_diverge():
    """Neither norm nor clip, and gates that may open wide: refused in tests/engine/test_config.py."""
    rule = make_rule("titans", depth=1, architecture=Architecture(norm=False), clip=None, options={})
    kept, _ = run(rule, 1, 0.5, 20_000)
    assert not all(torch.isfinite(matrix).all() for matrix in kept)
