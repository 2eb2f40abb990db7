"""A training step through its kernels, on a GPU, beside the loop that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mnemosyne.training.settings import Settings
from tests.kernels.triton import train_chains as chains
from tests.kernels.triton.cases import Shape, make_case
from tests.kernels.triton.train_cases import differences, worst
from tests.kernels.triton.train_chains import Chain
from tests.kernels.triton.train_steps import choose, gradients, inputs, step_of

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


def given_of(settings: Settings) -> list[Tensor]:
    return [x.cuda() for x in inputs(settings.vocabulary, *TOKENS)]


@contextmanager
def products(compute: torch.dtype) -> Iterator[None]:
    """fp32 operands of products as the trainer takes them, or exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if compute == torch.bfloat16 else "highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("compute", BOUNDS, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_has_the_gradients_of_the_loop(
    name: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS[name]
    step, given = step_of(settings, compute, "cuda"), given_of(settings)
    with products(compute), monkeypatch.context() as patch:
        got = gradients(step, given)
        choose(patch, kernels=False)
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
    step, given = step_of(SETTINGS["mag"], compute, "cuda"), given_of(SETTINGS["mag"])

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


CHAINS = {
    "norm": lambda: chains.norm(3, 700, 256),
    "add": lambda: chains.add(3, 700, 256),
    "swiglu": lambda: chains.swiglu(500, 2 * 704),
    "features": lambda: chains.features(500, 4, 64, 3, 2),
    "gate": lambda: chains.gate(3, 700, 256),
    "emit": lambda: chains.emit(500, 4, 64),
    "token_gates": lambda: chains.token_gates(500, 256, 4, 3),
    "heads": lambda: chains.heads(500, 128, 4, 64),
    "window": lambda: chains.window(512, 128, 4, 64, 64, 8),
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_each_chain_has_the_gradients_of_the_reference(make: Callable[[], Chain]) -> None:
    torch.manual_seed(0)
    error, where = chains.worst(make(), lambda x: x.cuda())
    assert error < 1e-5, where
