"""A small training step for tests: a model by settings, a batch, and the gradients of its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mnemosyne.engine.model import Titans
from mnemosyne.kernels import attention, chunk, fusion, gates
from mnemosyne.training.feed import Arrays
from mnemosyne.training.settings import Settings
from mnemosyne.training.step import Step
from tests.kernels.triton.train_cases import Tensors


def inputs(vocabulary: int, sessions: int, length: int) -> list[Tensor]:
    rng = np.random.default_rng(0)
    B, T = sessions, length
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
    return [torch.from_numpy(a) for a in arrays]


def step_of(settings: Settings, compute: torch.dtype, device: str) -> Step:
    torch.manual_seed(0)
    model = Titans(settings.model).to(device)
    model.set_compute(compute)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.memory.gate_weight.mul_(8)  # gates that differ from token to token
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(0.2 * torch.randn(p.shape).to(p))  # norms that tell their columns apart
    return Step(model, settings)


def gradients(step: Step, given: list[Tensor]) -> Tensors:
    step.model.zero_grad(set_to_none=True)
    step.losses(*given)[0].backward()
    return {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


def choose(patch: pytest.MonkeyPatch, kernels: bool) -> None:
    """The kernels of a training step, or none of them, whatever the device."""
    for module in (attention, chunk, gates):
        patch.setattr(module, "_trains_on_device", lambda *_: kernels)
    patch.setattr(fusion, "fuses", lambda _: kernels)
