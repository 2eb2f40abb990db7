"""The kernels in Triton's interpreter, on a CPU. fp32 alone: the interpreter computes bf16 wrongly.

``test_interpreter.py`` runs this in a process of its own, since triton decides when it is imported."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.kernels.gates import Gates, decays
from mnemosyne.kernels.reference import reference
from mnemosyne.kernels.triton import decay, support
from tests.kernels.triton.cases import Shape, decay_error, expected, make_case, run, worst

BOUND = 2e-6
SHAPES = [
    Shape(head_dim=32, chunk=16, chunks=4, sessions=2),
    Shape(head_dim=32, width=128, chunk=48, chunks=1, clip=None),
    Shape(head_dim=64, width=256, chunk=32, chunks=2, heads=1),
    Shape(head_dim=32, chunk=80, chunks=2, residual=False, clip=0.5),
    Shape(head_dim=32, chunk=112, chunks=3, norm=False),
    Shape(depth=1, head_dim=32, width=32, chunk=48, chunks=3, sessions=2),
    Shape(depth=1, head_dim=128, width=128, chunk=16, chunks=2, residual=False, norm=False, clip=None),
    Shape("delta", 1, 64, 64, 80, 2, residual=False, norm=False, clip=None),
    Shape("gated_delta", 1, 32, 32, 96, 3, residual=False, norm=False, clip=0.5),
    Shape("yaad", 2, 32, 64, 48, 3),
    Shape("yaad", 1, 32, 32, 128, 2, residual=False, norm=False, clip=None),
]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.PRECISIONS, torch.float32, "ieee")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_the_chunk_form(shape: Shape) -> None:
    case = make_case(shape)
    error, where = worst(run(case), expected(case))
    assert error < BOUND, where


@pytest.mark.parametrize("name", ["titans", "yaad"])
def test_equal_to_the_rule_token_by_token(name: str) -> None:
    shape = Shape(name, head_dim=32, chunk=16, chunks=3, heads=1)
    case = make_case(shape)
    y, scanned = run(case)

    def head(x: torch.Tensor) -> torch.Tensor:
        return x[0, 0].double()

    gates = Gates(*(None if x is None else head(x).flatten(-2) for x in case.gates))
    right, memory, momentum, norms = reference(
        *(head(x).flatten(0, 1) for x in (case.q, case.k, case.v)),
        gates,
        [head(m) for m in case.memory],
        [head(s) for s in case.momentum],
        case.rule,
        chunk=shape.chunk,
    )
    pairs = [(y, right), (scanned.norms.flatten(-2), norms)]
    pairs += [*zip(scanned.memory, memory, strict=True), *zip(scanned.momentum, momentum, strict=True)]
    for got, want in pairs:
        assert float((head(got).view(want.shape) - want).norm() / want.norm()) < BOUND


@pytest.mark.parametrize("length", [6, 48, 64])
@pytest.mark.parametrize("rule", ["titans", "delta", "gated_delta"])
def test_decays(rule: str, length: int) -> None:
    shape = Shape(rule, 1, 32, chunk=length, sessions=2, residual=False, norm=False)
    gates = make_case(shape).gates
    if gates.eta is not None:
        gates.eta[..., :3] = 0  # resets that follow each other
    with torch.no_grad():
        assert decay_error(decay.decays(gates), decays(gates.map(lambda x: x.double()))) < BOUND


def test_closed_gates_leave_the_memory_alone_to_the_bit() -> None:
    case = make_case(Shape(head_dim=32, chunk=16, chunks=3))
    for gate in (case.gates.theta, case.gates.alpha, *case.momentum):
        gate.zero_()
    _, scanned = run(case)
    for now, before in zip(scanned.memory, case.memory, strict=True):
        assert torch.equal(now, before)
    assert not any(s.any() for s in scanned.momentum)


def test_what_fades_away_becomes_exactly_nothing() -> None:
    case = make_case(Shape(head_dim=32, chunk=16, chunks=2))
    case.gates.theta.zero_()
    for x in (*case.memory, *case.momentum):
        x.fill_(2e-30)
    case.gates.alpha.fill_(0.1)
    _, scanned = run(case)
    assert not any(x.any() for x in (*scanned.memory, *scanned.momentum))


def test_what_is_not_finite_stays_so() -> None:
    case = make_case(Shape(head_dim=32, chunk=16, chunks=2))
    case.v[0, 0, 0, 3, 5] = float("nan")
    y, scanned = run(case)
    assert not torch.isfinite(y[0, 0]).all() and torch.isfinite(y[0, 1]).all()
    for tensors in (scanned.memory, scanned.momentum):
        assert not any(torch.isfinite(x[0, 0]).all() for x in tensors)
        assert all(torch.isfinite(x[0, 1]).all() for x in tensors)
