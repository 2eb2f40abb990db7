"""One head's memory, tokens and gates for any rule, and the forms of it that the tests compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mnemosyne.kernels import chunk, decode, network
from mnemosyne.kernels.gates import Decays, Gates, decays
from mnemosyne.kernels.reference import reference
from mnemosyne.kernels.rules.registry import RULES, make_rule
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule

LINEAR = ("delta", "gated_delta")
FORMS = [
    (rule, depth, residual, norm)
    for rule in RULES
    for depth in (1, 2, 3, 4)
    for residual in (False, True)
    for norm in (False, True)
    if rule not in LINEAR or (depth == 1 and not residual and not norm)
]
"""Every rule in every form that it may have."""


def rule_of(
    name: str,
    depth: int = 1,
    *,
    residual: bool = False,
    norm: bool = False,
    **options: float,
) -> MemoryRule:
    return make_rule(
        name,
        depth=depth,
        architecture=Architecture(residual=residual, norm=norm),
        clip=None,
        options=options,
    )


def usual(name: str) -> MemoryRule:
    """The rule in the form that models use: two layers, residual, norm; one matrix where it has no more."""
    return rule_of(name) if name in LINEAR else rule_of(name, 2, residual=True, norm=True)


@dataclass(frozen=True)
class Case:
    """T tokens of one head, in float64. What differs from it is another case."""

    rule: MemoryRule
    length: int
    """Tokens a chunk."""
    q: Tensor
    """`[T, d]`, as ``k`` and ``v``."""
    k: Tensor
    v: Tensor
    gates: Gates
    """`[D, T]`, the threshold `[T]`."""
    memory: list[Tensor]
    """`[out, in]` a memory layer."""
    momentum: list[Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """Every tensor of it changed, for a dtype or for gradients."""
        tensors = {name: change(getattr(self, name)) for name in ("q", "k", "v")}
        lists = {name: [change(x) for x in getattr(self, name)] for name in ("memory", "momentum")}
        return replace(self, gates=self.gates.map(change), **tensors, **lists)

    def gated(self, **gates: Tensor) -> Case:
        return replace(self, gates=self.gates._replace(**gates))

    def tokens(self, first: int, last: int) -> Case:
        """Tokens ``first`` to before ``last`` alone."""
        part = {name: getattr(self, name)[first:last] for name in ("q", "k", "v")}
        return replace(self, gates=self.gates.map(lambda gate: gate[..., first:last]), **part)

    def reference(self) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Token by token with autograd: reads `[T, d]`, memory, momentum, norms `[D, T]`."""
        tensors = (self.q, self.k, self.v, self.gates, self.memory, self.momentum)
        return reference(*tensors, self.rule, chunk=self.length)

    def chunked(self) -> tuple[Tensor, chunk.Scan, Decays]:
        """The chunk form: reads `[T, d]`, the scan, the decays."""
        return stack_chunked([self])

    def decoded(self) -> Tensor:
        """The decode form, each chunk committed by the chunk form when it is whole: reads `[T, d]`."""
        memory, momentum = self.memory, self.momentum
        rows = []
        for first in range(0, len(self.q), self.length):
            part = replace(
                self.tokens(first, first + self.length), memory=list(memory), momentum=list(momentum)
            )
            cache = part.fresh_cache()
            rows += [part.step(t, cache) for t in range(self.length)]
            _, scanned, _ = part.chunked()
            memory, momentum = ([x[0, 0] for x in xs] for xs in (scanned.memory, scanned.momentum))
        return torch.stack(rows)

    def fresh_cache(self) -> dict[str, Tensor]:
        shapes = [(m.shape[0], m.shape[1]) for m in self.memory]
        names = decode.cache_shapes(1, self.length, shapes, self.rule.algorithm.momentum)
        cache = {name: self.q.new_zeros(1, *shape) for name, shape in names.items()}
        decode.fresh(cache["decay"])
        return cache

    def step(self, t: int, cache: Mapping[str, Tensor]) -> Tensor:
        """Decode token t of a case of one chunk; `[d]`."""
        q, k, v = (x[t][None, None] for x in (self.q, self.k, self.v))
        gates = self.gates.map(lambda gate: gate[..., t][None, None])
        start = [[x[None, None] for x in xs] for xs in (self.memory, self.momentum)]
        return decode.step(q, k, v, gates, *start, cache, torch.tensor([t]), self.rule)[0, 0]


def stack_chunked(cases: list[Case]) -> tuple[Tensor, chunk.Scan, Decays]:
    """The chunk form of cases of one shape in one batch; reads `[len(cases) T, d]`."""
    first = cases[0]

    def rows(name: str) -> Tensor:
        x = torch.stack([getattr(case, name) for case in cases])
        return x.view(len(cases), 1, -1, first.length, x.shape[-1])

    def matrices(name: str) -> list[Tensor]:
        lists = [getattr(case, name) for case in cases]
        return [torch.stack(layer).unsqueeze(1) for layer in zip(*lists, strict=True)]

    per_gate = zip(*[case.gates for case in cases], strict=True)
    stacked = [None if gate[0] is None else torch.stack(gate).unsqueeze(1) for gate in per_gate]
    gates = Gates(*stacked).chunks(first.length)
    decay = decays(gates)
    scanned = chunk.scan(
        rows("k"), rows("v"), gates.threshold, decay, matrices("memory"), matrices("momentum"), first.rule
    )
    return chunk.read(rows("q"), decay, scanned, first.rule).flatten(0, 3), scanned, decay


def make_case(
    rule: MemoryRule,
    depth: int,
    *,
    gates: str = "plain",
    head: int = 8,
    hidden: int = 12,
    length: int = 6,
    chunks: int = 3,
    seed: int = 0,
) -> Case:
    """Random; ``gates`` "plain", or "ends" with exact zeros and resets among them."""
    g = torch.Generator().manual_seed(seed)
    T, widths = length * chunks, [head] + [hidden] * (depth - 1) + [head]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    scales = [1.0 if rule.retention.proportional else 2.0 * width**0.5 for width in widths]
    memory = [normal(widths[i + 1], widths[i]) * (scales[i] / widths[i] ** 0.5) for i in range(depth)]
    theta = uniform(depth, T) * (0.3 / length)
    eta, alpha, threshold = uniform(depth, T), 0.1 * uniform(depth, T), 0.2 + 4 * uniform(T)
    if gates == "ends":
        theta[uniform(depth, T) < 0.3] = 0
        eta[uniform(depth, T) < 0.3] = 0
        eta[uniform(depth, T) < 0.2] = 1
        alpha[uniform(depth, T) < 0.2] = 0
        alpha[uniform(depth, T) < 0.2] = 1
    return Case(
        rule=rule,
        length=length,
        q=network.unit(normal(T, head)),
        k=network.unit(normal(T, head)),
        v=normal(T, head),
        gates=Gates(
            theta,
            eta if rule.algorithm.momentum else None,
            alpha if rule.retention.forgets else None,
            threshold if rule.bias.threshold else None,
        ),
        memory=memory,
        momentum=[0.02 * normal(*m.shape) for m in memory] if rule.algorithm.momentum else [],
    )


def usual_case(name: str, **options: Any) -> Case:
    return make_case(usual(name), 1 if name in LINEAR else 2, **options)


def clipped(case: Case) -> Case:
    """With a clip that half of the first chunk's gradients exceed, and half don't."""
    norms = case.tokens(0, case.length).chunked()[1].norms.flatten().sort().values
    middle = norms[len(norms) // 2 - 1 : len(norms) // 2 + 1].mean()
    algorithm = replace(case.rule.algorithm, clip=float(middle))
    return replace(case, rule=replace(case.rule, algorithm=algorithm))


def error(got: Tensor, expected: Tensor, start: Tensor | None = None) -> float:
    """Relative, in the norm. Of a state that was ``start``: relative to the larger of the two, since one that
    was reset a token ago may be rounding and nothing else."""
    scale = expected.double().norm()
    if start is not None:
        scale = torch.maximum(scale, start.double().norm())
    return float((got.double() - expected.double()).norm() / scale)


def worst_token(got: Tensor, expected: Tensor) -> float:
    """Largest error of a token's read `[T, d]`, relative to the mean size of the reads."""
    return float((got - expected).norm(dim=1).max() / expected.norm(dim=1).mean())
