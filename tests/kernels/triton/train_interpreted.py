"""The kernels of a training step in Triton's interpreter, in fp32, beside autograd through the reference in
float64. ``test_train_interpreter.py`` runs this in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from mnemosyne.kernels.triton import support
from tests.kernels.triton.cases import Case, Shape, guarded, guarded_outputs, make_case
from tests.kernels.triton.train_cases import differentiated, run_of, taken, worst

BOUND = 2e-6
PLAIN = {"residual": False, "norm": False}
SHAPES = [
    Shape(depth=1, head_dim=32, width=32, chunk=16, chunks=3, sessions=2, norm=False, clip=None),
    Shape(depth=1, head_dim=64, width=64, chunk=32, chunks=2, norm=False, clip=16.0),
    Shape(depth=1, head_dim=32, width=32, chunk=64, chunks=2, heads=1, norm=False, clip=12.0),
    Shape(depth=1, head_dim=32, width=32, chunk=16, chunks=3, clip=60.0),
    Shape(depth=1, head_dim=32, width=32, chunk=16, chunks=3, residual=False, clip=None),
    Shape("delta", 1, 32, 32, 16, 3, **PLAIN, clip=12.0),
    Shape("gated_delta", 1, 32, 32, 16, 3, **PLAIN, clip=None),
]
PARTS = ("decays", "scan", "read")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.PRECISIONS, torch.float32, "ieee")


def compared(part: str, case: Case, only: Sequence[str] = ()) -> None:
    with guarded_outputs():
        error, where = worst(part, case, guarded, only)
    assert error < BOUND, where


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_the_reference(shape: Shape, part: str) -> None:
    compared(part, make_case(shape))


@pytest.mark.parametrize(
    ("part", "only"),
    [
        *(("decays", name) for name in ("A", "G", "F", "E", "P", "scalars", "rows")),
        ("scan", "rstd"),
        *(("scan", name) for name in ("memory", "momentum", "starts", "inputs", "deltas", "norms")),
    ],
)
def test_the_gradient_of_each_output_alone(part: str, only: str) -> None:
    compared(part, make_case(SHAPES[3] if only == "rstd" else replace(SHAPES[0], clip=12.0)), (only,))


def at_their_ends(case: Case) -> Case:
    """Every gate closed or wide open somewhere, whole chunks of closed ones among them, and resets that
    follow each other."""
    theta, eta, alpha, _ = case.gates
    assert eta is not None and alpha is not None
    theta[..., 1, :] = 0
    theta[..., ::3] = 0
    eta[..., 2:5] = 0
    eta[..., 0, -1] = 0
    eta[..., 1, :] = 0
    alpha[..., 1::4] = 0
    alpha[..., 7:9] = 1
    alpha[..., -1, -1] = 1
    alpha[..., 0, 0] = 1
    return case


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("clip", [None, 12.0])
def test_gates_at_their_ends(part: str, clip: float | None) -> None:
    case = at_their_ends(make_case(replace(SHAPES[0], clip=clip)))
    case.k[:, :, 0, 3] = 0
    case.k[:, :, 0, 5] = 0
    case.v[:, :, 0, 5] = 0  # an error of exactly 0 besides
    compared(part, case)


def test_a_state_of_zero_passes_nothing_on() -> None:
    """What was settled to 0 has no gradient, as in the loop, and the first state has."""
    case = make_case(SHAPES[0])
    case.gates.theta.zero_()
    case.momentum[0].zero_()
    case.memory[0][..., 3] = 0
    compared("scan", case)
    case.memory[0].fill_(2e-30)
    assert case.gates.alpha is not None
    case.gates.alpha.fill_(0.1)
    compared("scan", case)


def test_some_are_clipped_and_some_not() -> None:
    """Or the cases above would not say much."""
    for shape in SHAPES:
        if shape.clip is not None:
            case = make_case(shape)
            norms = differentiated(run_of("scan", case.rule, fused=False), taken("scan", case))[0]["norms"]
            assert bool((norms > shape.clip).any()) and bool((norms < shape.clip).any()), shape
