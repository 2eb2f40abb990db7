"""Which model serves a checkpoint: the kernels' only where they were tested, with a reason where not."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from mnemosyne.engine.config import MemoryConfig, ModelConfig
from mnemosyne.engine.gpu import choice
from mnemosyne.engine.model import Titans
from mnemosyne.kernels.triton import support
from tests.engine.models import small_model

CUDA = torch.device("cuda")
SERVED = ModelConfig(variant="mac", layers=1, dim=128, vocab_size=80, memory=MemoryConfig(expansion=4))


def reason(config: ModelConfig, compute: torch.dtype = torch.bfloat16) -> str | None:
    return choice.unserved(config, compute, CUDA)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_hopper", lambda device: True)


def memory(**changes: object) -> ModelConfig:
    return dataclasses.replace(SERVED, memory=MemoryConfig(**changes))


def linear(rule: str, **changes: object) -> ModelConfig:
    return memory(rule=rule, depth=1, residual=False, norm=False, eta_max=None, **changes)


@pytest.mark.usefixtures("on_hopper")
def test_what_the_kernels_take() -> None:
    for variant in ("mac", "mag", "mal", "lmm"):
        for size in (memory(expansion=1), memory(expansion=4), memory(depth=1)):
            assert reason(dataclasses.replace(size, variant=variant)) is None


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("config", "word"),
    [
        (memory(rule="yaad"), "Huber"),
        (memory(rule="moneta"), "rule of"),
        (linear("delta", alpha_max=None), "without a forget gate"),
        (linear("gated_delta"), "without momentum"),
        (memory(depth=3), "depth 3"),
        (memory(expansion=8), "hidden width 512"),
        (dataclasses.replace(SERVED, head_dim=32), "head_dim 32"),
        (dataclasses.replace(SERVED, chunk=32), "chunk 32"),
        (dataclasses.replace(SERVED, segment=192), "cells of 192"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_they_dont_take_has_a_reason(config: ModelConfig, word: str) -> None:
    assert word in (reason(config) or "")


@pytest.mark.usefixtures("on_hopper")
def test_fp32_isnt_theirs() -> None:
    assert reason(SERVED, torch.float32) == "torch.float32 on a GPU"


def test_they_need_hopper_triton_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"capability": (9, 0), "triton": object(), "gcc": "/usr/bin/gcc"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    monkeypatch.setattr("shutil.which", found.get)

    def served() -> bool:
        support._hopper.cache_clear()
        return reason(SERVED) is None

    assert served()
    for name, instead in (("capability", (8, 0)), ("triton", None), ("gcc", None)):
        with monkeypatch.context() as without:
            without.setitem(found, name, instead)
            assert not served(), name
    support._hopper.cache_clear()


def test_a_cpu_has_the_reference_and_a_gpu_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model(SERVED)
    with caplog.at_level(logging.WARNING):
        assert choice.served(model) is model
        assert not caplog.records
        monkeypatch.setattr(Titans, "device", CUDA)
        assert choice.served(model) is model
    assert [record.getMessage() for record in caplog.records] == [
        "no kernels for torch.float32 on a GPU: the reference runs, many times slower"
    ]
