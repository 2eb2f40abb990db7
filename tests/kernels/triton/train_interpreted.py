"""The kernels of a training step in Triton's interpreter, in fp32, beside autograd through the reference in
float64. ``test_train_interpreter.py`` runs this in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.triton.cases import Case, Shape, guarded, guarded_outputs, make_case
from tests.kernels.triton.train_cases import differences, differentiated, fused, looped

BOUND = 1e-5
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


def compared(case: Case, only: tuple[str, ...] = ()) -> None:
    right = differentiated(looped, case.map(lambda x: x.double()), only)
    with guarded_outputs():
        made = differentiated(fused, case.map(guarded), only)
    for got, want in zip(made, right, strict=True):
        assert all(bool(torch.isfinite(x).all()) for x in got.values())
        found = differences(got, want)
        assert max(found.values()) < BOUND, found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_the_loop(shape: Shape) -> None:
    compared(make_case(shape))


@pytest.mark.parametrize("only", ["memory", "momentum", "starts", "deltas", "norms", "rstd"])
def test_the_gradient_of_each_output_alone(only: str) -> None:
    clipped = SHAPES[3] if only == "rstd" else replace(SHAPES[0], clip=12.0)
    compared(make_case(clipped), (only,))


def at_their_ends(case: Case) -> Case:
    """Every gate closed or wide open somewhere, whole chunks of closed ones among them."""
    theta, eta, alpha, _ = case.gates
    assert eta is not None and alpha is not None
    theta[..., 1, :] = 0
    theta[..., ::3] = 0
    eta[..., 2:5] = 0
    eta[..., 0, -1] = 0
    alpha[..., 1::4] = 0
    alpha[..., 7] = 1
    alpha[..., -1, -1] = 1
    return case


@pytest.mark.parametrize("clip", [None, 12.0])
def test_gates_at_their_ends(clip: float | None) -> None:
    case = at_their_ends(make_case(replace(SHAPES[0], clip=clip)))
    case.k[:, :, 0, 3] = 0
    case.k[:, :, 0, 5] = 0
    case.v[:, :, 0, 5] = 0  # an error of exactly 0 besides
    compared(case)


def test_a_state_of_zero_passes_nothing_on() -> None:
    """What was settled to 0 has no gradient, as in the loop, and the first state has."""
    case = make_case(SHAPES[0])
    case.gates.theta.zero_()
    case.momentum[0].zero_()
    case.memory[0][..., 3] = 0
    compared(case)
    case.memory[0].fill_(2e-30)
    assert case.gates.alpha is not None
    case.gates.alpha.fill_(0.1)
    compared(case)


def test_some_clipped_and_some_not() -> None:
    """Or the cases above would not say much."""
    for shape in SHAPES:
        if shape.clip is not None:
            norms = differentiated(looped, make_case(shape))[0]["norms"]
            assert bool((norms > shape.clip).any()) and bool((norms < shape.clip).any()), shape
