"""What lies between a training step's products by kernels in Triton's interpreter, beside autograd in
float64, alone and in a whole model. ``test_train_interpreter.py`` runs this in a process of its own."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.kernels.triton import support
from mnemosyne.training.settings import Settings
from tests.kernels.triton import train_chains as chains
from tests.kernels.triton.cases import guarded, guarded_outputs
from tests.kernels.triton.train_cases import differences
from tests.kernels.triton.train_chains import Chain
from tests.kernels.triton.train_steps import choose, gradients, inputs, step_of

BOUND = 2e-6
ROUNDED = 3e-3
"""Where something is rounded to bf16 once."""
SMALL = {"layers": 2, "chunk": 16, "window": 32, "vocabulary": 64, "persistent": 4, "lengths": "96:1e9"}
SETTINGS = {
    "mag": Settings(**SMALL, dim=128, depth=1, norm=False, clip=16.0, theta_max=0.5),
    "mal": Settings(**SMALL, dim=64, depth=1, norm=False, residual=False, variant="mal", rule="gated_delta"),
    "mac": Settings(**SMALL, dim=64, depth=1, norm=False, clip=16.0, theta_max=0.5, variant="mac"),
}


@pytest.fixture(autouse=True)
def same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(support.PRECISIONS, torch.float32, "ieee")


def compared(chain: Chain, only: tuple[str, ...] = ()) -> None:
    with guarded_outputs():
        error, where = chains.worst(chain, guarded, only)
    assert error < BOUND, where


@pytest.mark.parametrize("shape", [(3, 70, 64), (2, 5, 256), (11, 48), (600, 8)], ids=str)
def test_norm(shape: tuple[int, ...]) -> None:
    compared(chains.norm(*shape))


@pytest.mark.parametrize("only", [(), ("total",), ("y",)], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 64), (11, 96)], ids=str)
def test_sum_and_its_norm(shape: tuple[int, ...], only: tuple[str, ...]) -> None:
    compared(chains.add(*shape), only)


@pytest.mark.parametrize("shape", [(7, 2 * 192), (2, 3, 2 * 40)], ids=str)
def test_swiglu(shape: tuple[int, ...]) -> None:
    compared(chains.swiglu(*shape))


@pytest.mark.parametrize(
    "shape",
    [(64, 2, 16, 3, 2), (130, 1, 32, 1, 1), (16, 1, 32, 3, 2), (3, 2, 24, 2, 0), (62, 1, 16, 1, 1, 2)],
)
def test_features(shape: tuple[int, ...]) -> None:
    compared(chains.features(*shape))


@pytest.mark.parametrize("paper", [False, True], ids=["default", "paper"])
@pytest.mark.parametrize("shape", [(2, 70, 64), (11, 96)], ids=str)
def test_gate(shape: tuple[int, ...], paper: bool) -> None:
    compared(chains.gate(*shape, paper=paper))


@pytest.mark.parametrize("shape", [(64, 2, 32), (150, 1, 32, 3), (5, 3, 24)], ids=str)
def test_emit(shape: tuple[int, ...]) -> None:
    compared(chains.emit(*shape))


@pytest.mark.parametrize("shape", [(64, 32, 2, 32), (70, 16, 1, 48)], ids=str)
def test_heads(shape: tuple[int, ...]) -> None:
    compared(chains.heads(*shape))


@pytest.mark.parametrize(
    "shape",
    [(64, 32, 2, 32, 16, 4), (32, 64, 1, 32, 32, 20), (16, 16, 1, 32, 16, 0), (48, 32, 1, 32, 16, 70)],
)
def test_window(shape: tuple[int, ...]) -> None:
    compared(chains.window(*shape))


@pytest.mark.parametrize("shape", [(64, 64, 4, 3), (70, 96, 2, 3), (16, 128, 5, 2), (5, 40, 1, 1)], ids=str)
def test_token_gates(shape: tuple[int, ...]) -> None:
    compared(chains.token_gates(*shape))


def in_bf16(chain: Chain, *names: str) -> Chain:
    """With these leaves in bf16, whose values they have then."""

    def fused(leaves: chains.Tensors) -> chains.Tensors:
        return chain.fused({name: x.bfloat16() if name in names else x for name, x in leaves.items()})

    return Chain({name: x.bfloat16().double() for name, x in chain.leaves.items()}, fused, chain.reference)


@pytest.mark.parametrize(
    "chain",
    [
        in_bf16(chains.norm(3, 70, 64, dtype=torch.bfloat16), "x"),
        in_bf16(chains.add(3, 70, 64, dtype=torch.bfloat16), "more"),
        in_bf16(chains.swiglu(7, 2 * 192), "up"),
        in_bf16(chains.features(64, 2, 16, 3, 2), "streams", "tail"),
        in_bf16(chains.gate(3, 70, 64), "y", "m"),
        in_bf16(chains.emit(64, 2, 32), "z"),
        in_bf16(chains.heads(64, 32, 2, 32), "product", "past_k", "past_v"),
        in_bf16(chains.token_gates(64, 64, 4, 3), "u"),
    ],
    ids="norm add swiglu features gate emit heads token_gates".split(),
)
def test_in_bf16(chain: Chain) -> None:
    with guarded_outputs():
        error, where = chains.worst(chain, guarded)
    assert error < ROUNDED, where


def test_window_in_bf16() -> None:
    """Weights and their gradients are rounded too, between its products."""
    chain = chains.window(64, 32, 2, 32, 16, 4)
    with guarded_outputs():
        error, where = chains.worst(in_bf16(chain, *chain.leaves), guarded)
    assert error < 2 * ROUNDED, where


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_of_a_model_has_the_gradients_of_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS[name]
    given = inputs(settings.vocabulary, 2, 48)
    step = step_of(settings, torch.float32, "cpu")
    choose(monkeypatch, kernels=True)
    with guarded_outputs():
        got = gradients(step, given)
    choose(monkeypatch, kernels=False)
    step.model.double().set_compute(torch.float64)
    found = differences(got, gradients(step, given))
    assert max(found.values()) < 1e-5, found


def test_in_bf16_the_loss_of_a_model_has_gradients_as_exact_as_the_library() -> None:
    settings = SETTINGS["mag"]
    given = inputs(settings.vocabulary, 2, 48)
    made = []
    for kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            choose(patch, kernels)
            made.append(gradients(step_of(settings, torch.bfloat16, "cpu"), given))
    step = step_of(settings, torch.float32, "cpu")
    step.model.double().set_compute(torch.float64)
    fused, plain = (differences(x, gradients(step, given)) for x in made)
    assert max(fused.values()) < 1.5 * max(plain.values()), (fused, plain)
