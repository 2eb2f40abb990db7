"""The kernels compile for a Hopper GPU, on any machine, within what a program may have of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mnemosyne.kernels.gates import decays
from tests.kernels.triton.cases import Shape, expected, make_case
from tests.kernels.triton.compiling import Resources, launches, resources

SHARED = 227 * 1024
"""Bytes that one program may have."""
SHAPE = Shape(width=256, chunks=1, heads=1)
"""The one that has least room."""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(shape: Shape, which: str) -> Resources:
    from mnemosyne.kernels.triton import read, scan

    case = make_case(shape).operands(torch.bfloat16)
    decay = decays(case.gates)
    call: Callable[[], object]
    if which == "scan":
        module, kernel = scan, scan.scan_kernel
        arguments = (case.k, case.v, case.gates.threshold, decay, case.memory, case.momentum, case.rule)
        call = lambda: scan.scan(*arguments)  # noqa: E731
    else:
        module, kernel = read, read.read_kernel
        _, scanned = expected(case)
        single = scanned._replace(
            **{name: [x.float() for x in getattr(scanned, name)] for name in ("starts", "inputs", "deltas")}
        )
        call = lambda: read.read(case.q, decay, single, case.rule)  # noqa: E731
    (launch,) = launches(module, f"{which}_kernel", call)
    return resources(kernel, launch)


@pytest.mark.parametrize("which", ["scan", "read"])
def test_compiles_for_hopper(which: str, record_property: Callable[[str, object], None]) -> None:
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    found = compiled(SHAPE, which)
    print(f"{which} of {SHAPE}: {found}")
    record_property("resources", str(found))
    assert found.shared <= SHARED
    assert found.wgmma and not found.mma, "a product isn't computed as Hopper does it best"
    # A few addresses may live in memory; tiles that do cost more than the products.
    assert found.spilled <= 256
