"""The kernels of a training step compile for a Hopper GPU, on any machine, within what a program may have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.triton.cases import Shape, make_case
from tests.kernels.triton.compiling import recorded, resources
from tests.kernels.triton.train_cases import differentiated, fused

SHARED = 227 * 1024
"""Bytes that one program may have."""
SPILLED = 128
"""Bytes: some addresses, and no tile."""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_the_scan_compiles_for_hopper(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    from mnemosyne.kernels.triton import train_scan

    monkeypatch.setattr(train_scan, "precision", lambda: "tf32")
    found = recorded(monkeypatch, [train_scan])
    differentiated(fused, make_case(Shape(depth=1, chunks=1, heads=1, norm=False, clip=16.0)))
    assert set(found) == {"learn_kernel", "state_gradient_kernel", "token_gradient_kernel"}
    for name, launches in found.items():
        ((kernel, launch),) = launches
        needs = resources(kernel, launch)
        print(f"{name}: {needs}")
        record_property(name, str(needs))
        assert needs.shared <= SHARED and needs.spilled <= SPILLED, name
        assert needs.wgmma and not needs.mma, f"{name}: a product isn't computed as Hopper does it best"
