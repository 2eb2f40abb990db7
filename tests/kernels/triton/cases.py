"""Memories, tokens and gates for the kernels, and the comparison with the chunk form in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels import chunk, network
from mnemosyne.kernels.chunk import Scan
from mnemosyne.kernels.gates import Decays, Gates, decays
from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule

GUARD = 4096
"""Elements before and behind every tensor that a kernel is given or fills."""
SENTINEL = 12345.0
"""Stands around what a kernel fills: NaN wouldn't show what was written of NaN read beyond an end."""


@dataclass(frozen=True)
class Shape:
    rule: str = "titans"
    depth: int = 2
    head_dim: int = 64
    width: int = 64
    chunk: int = 64
    chunks: int = 2
    sessions: int = 1
    heads: int = 2
    residual: bool = True
    norm: bool = True
    clip: float | None = 1.0

    def __str__(self) -> str:
        form = f"{'r' if self.residual else '-'}{'n' if self.norm else '-'}{self.clip or '-'}"
        sizes = f"{self.head_dim}x{self.width} {self.sessions}x{self.heads}x{self.chunks}x{self.chunk}"
        return f"{self.rule} {self.depth} {sizes} {form}"

    def make(self) -> MemoryRule:
        architecture = Architecture(residual=self.residual, norm=self.norm)
        return make_rule(self.rule, depth=self.depth, architecture=architecture, clip=self.clip, options={})


@dataclass(frozen=True)
class Case:
    """What ``chunk.scan`` and ``chunk.read`` take."""

    rule: MemoryRule
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    memory: list[Tensor]
    momentum: list[Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        return replace(
            self,
            **{name: change(getattr(self, name)) for name in ("q", "k", "v")},
            gates=self.gates.map(change),
            **{name: [change(x) for x in getattr(self, name)] for name in ("memory", "momentum")},
        )

    def operands(self, dtype: torch.dtype) -> Case:
        """Keys, queries and values of another precision."""
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v")})

    def sessions(self, which: slice) -> Case:
        return self.map(lambda x: x[which].contiguous())

    def stretch(self, which: slice, scanned: Scan | None) -> Case:
        """Some of the chunks, on what a scan of those before them left."""
        at = (slice(None),) * 2
        part = replace(self, **{name: getattr(self, name)[(*at, which)] for name in ("q", "k", "v")})
        part = replace(part, gates=self.gates.map(lambda x: x[..., which, :]))
        return part if scanned is None else replace(part, memory=scanned.memory, momentum=scanned.momentum)


def make_case(shape: Shape, seed: int = 0) -> Case:
    """In fp32 on the CPU. Among the gates are closed ones, resets and a memory that is forgotten at once."""
    g = torch.Generator().manual_seed(seed)
    rule, B, H, n, L = shape.make(), shape.sessions, shape.heads, shape.chunks, shape.chunk
    widths = [shape.head_dim] + [shape.width] * (shape.depth - 1) + [shape.head_dim]
    tokens = (B, H, n, L, shape.head_dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=g)

    memory = [normal(B, H, widths[i + 1], widths[i]) / widths[i] ** 0.5 for i in range(shape.depth)]
    momentum = [0.02 * normal(*m.shape) for m in memory] if rule.algorithm.momentum else []
    cells = (B, H, shape.depth, n, L)
    theta, eta, alpha = 0.02 * uniform(*cells), 0.9 * uniform(*cells), 0.05 * uniform(*cells)
    theta[uniform(*cells) < 0.2] = 0
    eta[uniform(*cells) < 0.1] = 0
    alpha[uniform(*cells) < 0.02] = 1
    gates = Gates(
        theta,
        eta if rule.algorithm.momentum else None,
        alpha if rule.retention.forgets else None,
        2 * uniform(*cells[:2], n, L) + 0.1 if rule.bias.threshold else None,
    )
    q, k = network.unit(normal(*tokens)), network.unit(normal(*tokens))
    return Case(rule, q, k, normal(*tokens), gates, memory, momentum)


def guarded(x: Tensor) -> Tensor:
    """The same values, between NaN."""
    room = torch.full((x.numel() + 2 * GUARD,), float("nan"), dtype=x.dtype, device=x.device)
    inner = room[GUARD:-GUARD].view(x.shape)
    inner.copy_(x)
    return inner


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """What ``torch.empty`` makes is NaN, and nothing is written around it."""
    rooms: list[Tensor] = []

    def empty(*size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 else size)
        rooms.append(torch.full((shape.numel() + 2 * GUARD,), SENTINEL, dtype=dtype, device=device))
        return rooms[-1][GUARD:-GUARD].view(shape).fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    for room in rooms:
        around = torch.cat([room[:GUARD], room[-GUARD:]])
        assert bool((around == SENTINEL).all()), "written beyond its end"


def run(case: Case) -> tuple[Tensor, Scan]:
    """The kernels, whatever the device, on guarded inputs and outputs full of NaN."""
    from mnemosyne.kernels.triton.read import read
    from mnemosyne.kernels.triton.scan import scan

    with torch.no_grad():
        decay = decays(case.gates)
        case = case.map(guarded)
        with guarded_outputs():
            scanned = scan(case.k, case.v, case.gates.threshold, decay, case.memory, case.momentum, case.rule)
            return read(case.q, decay, scanned, case.rule), scanned


def expected(case: Case) -> tuple[Tensor, Scan]:
    """The chunk form in float64."""
    case = case.map(lambda x: x.double())
    with torch.no_grad():
        decay = decays(case.gates)
        scanned = chunk.scan(
            case.k, case.v, case.gates.threshold, decay, case.memory, case.momentum, case.rule
        )
        return chunk.read(case.q, decay, scanned, case.rule), scanned


def flat(result: tuple[Tensor, Scan]) -> dict[str, Tensor]:
    """Every tensor of a result by its name."""
    y, scanned = result
    named = {"y": y}
    for name, value in zip(Scan._fields, scanned, strict=True):
        tensors = value if isinstance(value, list) else [] if value is None else [value]
        named |= {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}
    return named


def errors(result: tuple[Tensor, Scan], right: tuple[Tensor, Scan]) -> dict[str, float]:
    """Relative, in the Frobenius norm; NaN where a number isn't finite or a shape is another."""
    got, want = flat(result), flat(right)
    assert got.keys() == want.keys()
    made = {}
    for name, x in got.items():
        same = x.shape == want[name].shape and bool(torch.isfinite(x).all())
        made[name] = float((x.double() - want[name]).norm() / want[name].norm()) if same else float("nan")
    return made


def worst(result: tuple[Tensor, Scan], right: tuple[Tensor, Scan]) -> tuple[float, str]:
    found = {name: error if error == error else float("inf") for name, error in errors(result, right).items()}
    name = max(found, key=lambda key: found[key])
    return found[name], name


def decay_error(got: Decays, want: Decays) -> float:
    """The worst of its tensors, relative, in the Frobenius norm."""
    pairs = zip((*got[:2], *(got.past or ())), (*want[:2], *(want.past or ())), strict=True)
    return max(float((x.double() - y).norm() / y.norm()) for x, y in pairs)
