"""The outer gradient, through the inner loop, against finite differences in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.rules.registry import RULES
from tests.kernels.cases import Case, clipped, usual_case

GATES = ("theta", "eta", "alpha", "threshold")
STEP = 1e-6
FORGET = [name for name in RULES if name != "delta"]


def inputs(case: Case) -> list[str]:
    """All that training moves: tokens, the gates that the rule has, the initial memory."""
    has = [name for name in GATES if getattr(case.gates, name) is not None]
    return ["q", "k", "v", *has, "memory", *(["momentum"] if case.momentum else [])]


def taken(case: Case, name: str) -> Tensor:
    """The input as one vector."""
    if name in GATES:
        return getattr(case.gates, name).flatten()
    value = getattr(case, name)
    return torch.cat([x.flatten() for x in value]) if isinstance(value, list) else value.flatten()


def put(case: Case, name: str, flat: Tensor) -> Case:
    if name in GATES:
        return case.gated(**{name: flat.view_as(getattr(case.gates, name))})
    value = getattr(case, name)
    if isinstance(value, list):
        parts = flat.split([x.numel() for x in value])
        return replace(case, **{name: [p.view_as(x) for p, x in zip(parts, value, strict=True)]})
    return replace(case, **{name: flat.view_as(value)})


def normal(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(case: Case) -> Tensor:
    """Of all that comes out: reads, memory, momentum, norms."""
    y, scanned, _ = case.chunked()
    parts = [y, *scanned.memory, *scanned.momentum, scanned.norms]
    return torch.stack([(part * normal(part.shape, i)).sum() for i, part in enumerate(parts)]).sum()


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", RULES)
def test_equals_finite_differences(name, clip):
    case = usual_case(name)
    case = clipped(case) if clip else case
    for part in inputs(case):
        at = taken(case, part)
        leaf = at.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(put(case, part, leaf)), leaf)
        for seed in (10, 11):
            direction = normal(at.shape, seed)
            ahead, behind = (loss(put(case, part, at + s * STEP * direction)) for s in (1, -1))
            numeric = float((ahead - behind) / (2 * STEP))
            assert float(gradient @ direction) == pytest.approx(numeric, rel=1e-5, abs=1e-7), part


@pytest.mark.parametrize("name", RULES)
def test_is_finite_where_gates_are_at_their_ends(name):
    """Resets, closed gates, and a key and an error of exactly 0 among the tokens."""
    case = clipped(usual_case(name, gates="ends"))
    case.k[1] = 0
    case.v[1] = 0
    for part in inputs(case):
        leaf = taken(case, part).clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(put(case, part, leaf)), leaf)
        assert torch.isfinite(gradient).all(), part
        assert gradient.abs().max() > 0, part


@pytest.mark.parametrize(
    ("name", "part", "end"), [("titans", "eta", 0.0), *[(r, "alpha", 1.0) for r in FORGET]]
)
def test_a_gate_at_its_end_can_leave_it(name, part, end):
    """A product over a reset is 0, and its slope in the gate that reset it is not."""
    case = usual_case(name)
    values = getattr(case.gates, part).clone()
    values[:, [2, 9, 10]] = end
    leaf = values.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(case.gated(**{part: leaf})), leaf)
    inward = STEP * (1 - 2 * end)
    for i in range(len(values)):
        for t in (2, 9, 10):
            moved = values.clone()
            moved[i, t] += inward
            numeric = float(loss(case.gated(**{part: moved})) - loss(case.gated(**{part: values}))) / inward
            assert float(gradient[i, t]) == pytest.approx(numeric, rel=1e-3, abs=1e-4)
            assert abs(numeric) > 1e-3, "nothing to leave for"
