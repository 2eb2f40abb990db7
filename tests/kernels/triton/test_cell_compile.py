"""The kernels of waves compile for a Hopper GPU, on any machine, within what a program may have of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from mnemosyne.engine.config import preset
from mnemosyne.engine.model import Titans
from tests.kernels.triton.compiling import Recorded, Resources, recorded, resources

SHARED = 227 * 1024
"""Bytes that one program may have."""
PRODUCTS = ("gemm", "recall", "attention", "logits", "decays", "learn")
WIDE = tuple("rows convolve recall rotate attention logits learn keep segment_end open_rows".split())
"""Most of whose loads are of 16 bytes; products of tiles load by descriptors, the others have little to
load."""
SPILLED = {"learn": 700, "gemm": 256}
"""Bytes a thread; none elsewhere. What a chunk of one head needs at once is more than registers hold."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """One layer of the preset 760M reads a segment and opens a chunk."""
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    from mnemosyne.engine.gpu.model import GpuTitans
    from mnemosyne.kernels.triton import (
        attention,
        cell_gates,
        gemm,
        learn,
        open_chunk,
        recall,
        rows,
        segment_end,
        step_product,
        step_rows,
        streams,
        summary,
    )

    head = (step_product, step_rows)  # of logits, compiled in test_step_compile.py
    of_waves = (attention, cell_gates, gemm, learn, open_chunk, recall, rows, segment_end, streams, summary)
    config = dataclasses.replace(preset("760M", vocab_size=64), layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        recorded(patch, head)
        found = recorded(patch, of_waves)
        gpu = GpuTitans(Titans(config).prepare(torch.bfloat16), graphs=False, tokens=config.segment, cells=1)
        state = gpu.initial_state()
        gpu.prefill([state], torch.zeros(1, config.segment, dtype=torch.int64))
        gpu.open_chunk([dataclasses.replace(state, pending=(1,), kinds=b"\0")])
        yield found


def compiled(launched: Recorded, kernel: str) -> list[tuple[dict[str, object], Resources]]:
    """Each form of ``kernel`` once: what is made of shapes that differ in sizes alone is left out."""
    forms = {}
    for function, launch in launched[f"{kernel}_kernel"]:
        options = {name: value for name, value in launch.options.items() if name != "CELL"}
        forms.setdefault(str(options), (function, launch))
    found = [(launch.options, resources(function, launch)) for function, launch in forms.values()]
    for options, needs in found:
        print(kernel, options, needs)
    return found


def test_every_kernel_is_here(launched: Recorded) -> None:
    assert {name.removesuffix("_kernel") for name in launched} == {
        *PRODUCTS,
        *WIDE,
        *("tail", "summary", "open_decay"),
    }


@pytest.mark.parametrize("kernel", sorted({*PRODUCTS, *WIDE, "tail", "summary", "open_decay"}))
def test_compiles_for_hopper(launched: Recorded, kernel: str) -> None:
    for options, found in compiled(launched, kernel):
        assert found.shared <= SHARED, options
        assert found.spilled <= SPILLED.get(kernel, 0), options
        if kernel in PRODUCTS:
            assert found.wgmma and not found.mma, "a product isn't computed as Hopper does it best"
        if kernel in WIDE:
            assert found.wide > found.narrow, options


def test_learn_has_a_form_that_stores_and_one_that_opens_a_chunk(launched: Recorded) -> None:
    forms = {(launch.options["STORE"], launch.options["CACHE"]) for _, launch in launched["learn_kernel"]}
    assert forms == {(True, False), (False, True)}
