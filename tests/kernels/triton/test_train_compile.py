"""The kernels of a training step compile for a Hopper GPU, on any machine, within what a program may have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.triton import train_chains as chains
from tests.kernels.triton.cases import Shape, make_case
from tests.kernels.triton.compiling import recorded, resources
from tests.kernels.triton.train_cases import differentiated, run_of, taken
from tests.kernels.triton.train_chains import Chain

SHARED = 227 * 1024
"""Bytes that one program may have."""
SPILLED = 192
"""Bytes a thread: some addresses and operands, few beside what it loads."""

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


CHAINS: dict[str, tuple[Chain, list[str]]] = {
    "norm": (chains.add(2, 512, 256, dtype=torch.bfloat16), ["more"]),
    "swiglu": (chains.swiglu(64, 2 * 704), ["up"]),
    "feature": (chains.features(128, 4, 64, 3, 2), ["streams", "tail"]),
    "gate": (chains.gate(2, 512, 256), ["y", "m"]),
    "emit": (chains.emit(128, 4, 64), ["z"]),
    "token_gates": (chains.token_gates(128, 256, 4, 3), ["u"]),
    "heads": (chains.heads(128, 128, 4, 64), ["product", "past_k", "past_v"]),
}
"""As a training step has them, and which leaves are bf16."""


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_compiles_for_hopper(
    name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    from mnemosyne.kernels.triton import (
        support,
        train_emit,
        train_features,
        train_gate,
        train_heads,
        train_norm,
        train_swiglu,
        train_token_gates,
    )

    monkeypatch.setitem(support.PRECISIONS, torch.float32, "tf32")
    modules = [
        train_emit,
        train_features,
        train_gate,
        train_heads,
        train_norm,
        train_swiglu,
        train_token_gates,
    ]
    found = recorded(monkeypatch, modules)
    chain, rounded = CHAINS[name]
    leaves = {n: x.to(torch.bfloat16 if n in rounded else torch.float32) for n, x in chain.leaves.items()}
    differentiated(chain.fused, leaves)
    assert set(found) == {f"{name}_kernel", f"{name}_gradient_kernel"}
    for kernel_name, launches in found.items():
        needs = resources(*launches[0])
        print(f"{kernel_name}: {needs}")
        record_property(kernel_name, str(needs))
        assert needs.shared <= SHARED // 4 and needs.spilled <= 16, kernel_name
        assert needs.wide > 0, f"{kernel_name}: rows aren't read in whole lines"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_window_attention_compiles_for_hopper(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    from mnemosyne.kernels.triton import support, train_window

    monkeypatch.setitem(support.PRECISIONS, torch.float32, "tf32")
    found = recorded(monkeypatch, [train_window])
    chain = chains.window(128, 128, 4, 64, 64, 8)
    differentiated(chain.fused, {name: x.to(dtype) for name, x in chain.leaves.items()})
    assert set(found) == {"window_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    for name, launches in found.items():
        needs = resources(*launches[0])
        print(f"{name}: {needs}")
        record_property(name, str(needs))
        assert needs.shared <= SHARED // 2 and needs.spilled <= SPILLED, name
        assert needs.wgmma and not needs.mma, f"{name}: a product isn't computed as Hopper does it best"
