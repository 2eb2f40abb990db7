"""The kernels of decode compile for a Hopper GPU, on any machine, within what a program may have of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mnemosyne.engine.config import MemoryConfig, ModelConfig
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.model import Titans
from tests.kernels.triton.compiling import Launch, Recorded, Resources, recorded, resources

SHARED = 227 * 1024
"""Bytes that one program may have."""
RESERVED = 1024
"""Bytes that every program takes besides."""
REGISTERS = 64 * 1024
"""That the programs of a multiprocessor share."""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launched(monkeypatch: pytest.MonkeyPatch, sessions: int, *, ahead: bool = True) -> Recorded:
    """What one step of MAC launches, by the sizes of the presets' heads; ``ahead``: by the kernels that
    have a memory on the chip."""
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    from mnemosyne.engine.gpu.decode import Step
    from mnemosyne.kernels.triton import (
        step_attention,
        step_memory,
        step_memory_resident,
        step_product,
        step_product_few,
        step_recall,
        step_recall_resident,
        step_rows,
    )

    modules = step_attention, step_memory, step_product, step_recall, step_rows
    resident = step_memory_resident, step_product_few, step_recall_resident
    if not ahead:
        monkeypatch.setattr(step_memory_resident, "VERSIONS", ())
    found = recorded(monkeypatch, (*modules, *resident))
    config = ModelConfig(
        variant="mac", layers=1, dim=512, vocab_size=512, persistent=128, memory=MemoryConfig(expansion=4)
    )
    weights = Weights.of(Titans(config).prepare(torch.bfloat16))
    Step(config, weights, step_product.grouped(weights.gates), sessions, graphs=False).run()
    return found


def compiled(launch: tuple[Any, Launch]) -> Resources:
    found = resources(*launch)
    print(launch[1].options, found)
    assert found.shared <= SHARED
    return found


@pytest.mark.parametrize(
    ("name", "programs", "spilled"),
    [("step_recall", 3, 0), ("step_attention", 4, 0), ("step_memory", 2, 168)],
)
def test_programs_share_a_multiprocessor(
    monkeypatch: pytest.MonkeyPatch, name: str, programs: int, spilled: int
) -> None:
    """So many at a time that one loads while another waits, and what they load comes 16 bytes at once."""
    ((kernel, launch),) = launched(monkeypatch, 64, ahead=False)[f"{name}_kernel"]
    found = compiled((kernel, launch))
    assert programs * found.registers * 32 * launch.options["num_warps"] <= REGISTERS
    assert programs * found.shared <= SHARED
    assert found.spilled <= spilled
    # The vectors of a token are short, and there are many of them.
    assert found.wide > {"step_memory": 60, "step_attention": 20}.get(name, 3 * found.narrow / 2)


@pytest.mark.parametrize(
    ("name", "sessions", "together", "spilled"),
    [("resident_recall", 128, 2, 0), ("resident_memory", 128, 2, 256), ("resident_memory", 1, 1, 16)],
)
def test_resident_programs_have_room(
    monkeypatch: pytest.MonkeyPatch, name: str, sessions: int, together: int, spilled: int
) -> None:
    """In a multiprocessor's registers as many as run together; in its shared memory the next launch's too."""
    ((kernel, launch),) = launched(monkeypatch, sessions)[f"{name}_kernel"]
    found = compiled((kernel, launch))
    assert together * found.registers * 32 * launch.options["num_warps"] <= REGISTERS
    assert 2 * (found.shared + RESERVED) <= SHARED + RESERVED
    assert found.spilled <= spilled


def test_products_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four programs of a multiprocessor hold their weights at once; the head is in fp32."""
    found = launched(monkeypatch, 1)
    assert len(found["few_product_kernel"]) == 7 and len(found["product_kernel"]) == 1
    for kernel, launch in (found["few_product_kernel"][i] for i in (0, 3, 5, 6)):
        taken = compiled((kernel, launch))
        assert taken.mma and not taken.wgmma and not taken.spilled
        assert 4 * (taken.shared + RESERVED) <= SHARED + RESERVED
    head = compiled(found["product_kernel"][0])
    assert head.mma and not head.wgmma and not head.spilled
    assert 4 * (head.shared + RESERVED) <= SHARED + RESERVED


@pytest.mark.parametrize("sessions", [64, 128])
def test_products(monkeypatch: pytest.MonkeyPatch, sessions: int) -> None:
    products = launched(monkeypatch, sessions)["product_kernel"]
    assert len(products) == 8
    with_gates, swiglu, in_fp32 = products[3], products[5], products[7]
    for launch in (with_gates, swiglu, in_fp32):
        found = compiled(launch)
        assert found.wgmma and not found.mma, "a product isn't computed as Hopper does it best"
        assert not found.spilled
