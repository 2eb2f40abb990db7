"""A training step through its kernels, on a GPU, beside the loop that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from mnemosyne.engine.model import Titans
from mnemosyne.kernels import chunk, gates
from mnemosyne.training.feed import Arrays
from mnemosyne.training.settings import Settings
from mnemosyne.training.step import Step
from tests.kernels.triton.cases import Shape, make_case
from tests.kernels.triton.train_cases import differences, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {
    "mag": Settings(layers=2, dim=128, depth=1, norm=False, clip=16.0, theta_max=0.5),
    "lmm": Settings(layers=2, dim=128, depth=1, clip=4.0, variant="lmm"),
    "delta": Settings(
        layers=2, dim=128, depth=1, norm=False, residual=False, variant="mal", rule="gated_delta"
    ),
}
SHAPES = [
    *(Shape(depth=1, chunk=n, chunks=5, sessions=3, norm=False, clip=16.0) for n in (16, 32, 64)),
    Shape(depth=1, chunks=3, clip=60.0),
    Shape(depth=1, head_dim=32, chunks=3, residual=False, clip=None),
    Shape("gated_delta", 1, chunks=3, residual=False, norm=False, clip=12.0),
]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative, of each parameter's gradient."""
TOKENS = (4, 512)
Gradients = dict[str, Tensor]


def inputs(vocabulary: int) -> list[Tensor]:
    rng = np.random.default_rng(0)
    B, T = TOKENS
    answer = (rng.random((B, 32)) < 0.3).astype(np.float32)
    arrays = Arrays(
        rng.integers(0, vocabulary, (B, T)),
        rng.integers(0, 3, (B, T)),
        rng.integers(0, T, (B, 32)),
        rng.integers(0, vocabulary, (B, 32)),
        answer,
        1 - answer,
        rng.integers(0, 1000, (B, 32)),
        rng.integers(0, 11, (B, 32)),
    )
    return [torch.from_numpy(a).cuda() for a in arrays]


def step_of(settings: Settings, compute: torch.dtype) -> Step:
    torch.manual_seed(0)
    model = Titans(settings.model).cuda()
    model.set_compute(compute)
    for block in model.blocks:
        block.mixer.memory.gate_weight.data.mul_(8)  # gates that differ from token to token
    return Step(model, settings)


def gradients(step: Step, given: list[Tensor]) -> Gradients:
    step.model.zero_grad(set_to_none=True)
    step.losses(*given)[0].backward()
    return {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


@contextmanager
def products(compute: torch.dtype) -> Iterator[None]:
    """fp32 operands of products as the trainer takes them, or exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if compute == torch.bfloat16 else "highest")
    yield
    torch.set_float32_matmul_precision(before)


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    for module in (chunk, gates):
        patch.setattr(module, "_trains_on_device", lambda *_: False)


@pytest.mark.parametrize("compute", BOUNDS, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_has_the_gradients_of_the_loop(
    name: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS[name]
    step, given = step_of(settings, compute), inputs(settings.vocabulary)
    with products(compute), monkeypatch.context() as patch:
        got = gradients(step, given)
        without_kernels(patch)
        want = gradients(step, given)
    found = differences(got, want)
    assert max(found.values()) < BOUNDS[compute], found


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("compute", BOUNDS, ids=str)
def test_a_graph_of_it_has_the_same_gradients(compute: torch.dtype) -> None:
    step, given = step_of(SETTINGS["mag"], compute), inputs(SETTINGS["mag"].vocabulary)

    def run() -> None:
        step.model.zero_grad(set_to_none=True)
        step.losses(*given)[0].backward()

    with products(compute):
        eager = gradients(step, given)
        graph = captured(run)
    parameters = {n: p for n, p in step.model.named_parameters() if n in eager}
    for p in parameters.values():
        assert p.grad is not None
        p.grad.fill_(float("nan"))
    graph.replay()
    again = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    found = differences(again, eager)
    # The library's products and sums by atomics may differ between runs.
    assert max(found.values()) < BOUNDS[compute] / 10, found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("part", ["decays", "scan", "read"])
def test_each_part_has_the_gradients_of_the_reference(part: str, shape: Shape) -> None:
    with products(torch.float32):
        error, where = worst(part, make_case(shape), lambda x: x.cuda())
    assert error < 1e-4, where
