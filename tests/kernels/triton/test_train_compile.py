"""The kernels of a training step compile for a Hopper GPU, on any machine, within what a program may have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.triton.cases import Shape, make_case
from tests.kernels.triton.compiling import recorded, resources
from tests.kernels.triton.train_cases import differentiated, run_of, taken

SHARED = 227 * 1024
"""Bytes that one program may have."""
SPILLED = 128
"""Bytes: some addresses, and no tile."""

KERNELS = {
    "decays": {"decay_kernel", "gate_gradient_kernel"},
    "scan": {"learn_kernel", "state_gradient_kernel", "token_gradient_kernel"},
    "read": {"read_kernel", "read_gradient_kernel"},
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("part", KERNELS)
def test_compiles_for_hopper(
    part: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    from mnemosyne.kernels.triton import support, train_decay, train_read, train_scan

    monkeypatch.setitem(support.PRECISIONS, torch.float32, "tf32")  # as the trainer has it
    found = recorded(monkeypatch, [train_decay, train_scan, train_read])
    case = make_case(Shape(depth=1, chunks=1, heads=1, norm=False, clip=16.0))
    leaves = {name: x.float() for name, x in taken(part, case).items()}
    differentiated(run_of(part, case.rule, fused=True), leaves)
    assert set(found) == KERNELS[part]
    for name, launches in found.items():
        ((kernel, launch),) = launches
        needs = resources(kernel, launch)
        print(f"{name}: {needs}")
        record_property(name, str(needs))
        assert needs.shared <= SHARED and needs.spilled <= SPILLED, name
        assert needs.wgmma and not needs.mma, f"{name}: a product isn't computed as Hopper does it best"
