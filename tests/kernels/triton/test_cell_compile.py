"""The kernels of waves compile for a Hopper GPU, on any machine, within what a program may have of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch

from mnemosyne.engine.config import preset
from mnemosyne.engine.model import Titans
from tests.kernels.triton.compiling import Recorded, Resources, recorded, resources

SHARED = 227 * 1024
"""Bytes that one program may have."""
PRODUCTS = ("gemm", "recall", "attention", "logits", "decays", "learn", "resident")
WIDE = tuple("rows convolve recall rotate attention logits learn keep segment_end open_rows".split())
"""Half of whose loads are of 16 bytes, at the least; products of tiles load by descriptors, the others have
little to load."""
SPILLED = {"learn": 700, "resident": 1200, "gemm": 256, "recall": 128}
"""Bytes a thread; none elsewhere. What a chunk of one head needs at once is more than registers hold."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """One layer of the preset 760M reads a segment and opens a chunk; then as if its memory had room on the
    chip, where it reads a chunk besides."""
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    from mnemosyne.engine.gpu.model import GpuTitans
    from mnemosyne.kernels.triton import (
        attention,
        cell_gates,
        gemm,
        learn,
        learn_resident,
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
    learns = (cell_gates, learn, learn_resident, summary)
    of_waves = (*learns, attention, gemm, open_chunk, recall, rows, segment_end, streams)
    config = dataclasses.replace(preset("760M", vocab_size=64), layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        recorded(patch, head)
        found = recorded(patch, of_waves)
        gpu = GpuTitans(Titans(config).prepare(torch.bfloat16), graphs=False, tokens=config.segment, cells=1)
        state = gpu.initial_state()
        segment = torch.zeros(1, config.segment, dtype=torch.int64)
        opened = dataclasses.replace(state, pending=(1,), kinds=b"\0")
        gpu.prefill([state], segment)
        gpu.open_chunk([opened])
        patch.setattr(learn_resident, "_has_room", lambda device: True)
        gpu.prefill([state], segment)
        gpu.prefill([state], segment[:, : config.chunk])
        gpu.open_chunk([opened])
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
            assert found.wide >= found.narrow, options


def test_what_moves_a_memory_that_fits_on_the_chip_is_one_kernel_in_every_wave(launched: Recorded) -> None:
    forms = [(launch.options["STORE"], launch.options["CACHE"]) for _, launch in launched["learn_kernel"]]
    assert [form for form, _ in groupby(forms)] == [(True, False), (False, True)]
    assert {launch.options["CELL"] for _, launch in launched["resident_kernel"]} == {512, 64}
