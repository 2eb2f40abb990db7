"""One allocation for all tensors of a session: where they lie, and when they are copied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mnemosyne.engine.gpu.blob import ALIGNMENT, BlobLayout, Shapes, gpu_layout
from mnemosyne.engine.gpu.open_cache import open_layout
from mnemosyne.engine.state import state_layout
from tests.engine.gpu.opened import tiny
from tests.engine.models import VARIANTS

CPU = torch.device("cpu")
SHAPES: Shapes = {
    "one": ((2, 3, 5), torch.float32),
    "two": ((2, 7), torch.bfloat16),
    "three": ((2, 64), torch.float32),
    "four": ((2, 1), torch.bfloat16),
}
"""Sizes that are no multiple of anything, and one that is."""


def filled(shapes: Shapes) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, (shape, dtype) in shapes.items()}


def test_tensors_are_aligned_and_disjoint() -> None:
    layouts = [BlobLayout(SHAPES)]
    for variant in VARIANTS:
        for depth in (1, 2):
            config = tiny(variant, depth=depth)
            layouts += [gpu_layout(config, torch.bfloat16), open_layout(config, torch.bfloat16)]
    for layout in layouts:
        end = 0
        for place in layout.places.values():
            assert place.offset % ALIGNMENT == 0 and place.offset >= end
            end = place.offset + place.stride * place.shape[0]
        assert end <= layout.nbytes < end + ALIGNMENT


def test_a_layer_lies_a_stride_behind_the_one_before() -> None:
    layout = BlobLayout(SHAPES)
    views = layout.views(layout.empty(CPU))
    for name, place in layout.places.items():
        assert views[name][1].data_ptr() - views[name][0].data_ptr() == place.stride


def test_views_are_what_was_packed_and_share_no_byte() -> None:
    layout, tensors = BlobLayout(SHAPES), filled(SHAPES)
    views = layout.views(layout.pack(tensors, CPU))
    assert list(views) == list(SHAPES)
    for name, want in tensors.items():
        assert views[name].dtype == want.dtype and torch.equal(views[name], want)
    for name in SHAPES:
        views[name].zero_()
        assert all(torch.equal(views[n], t) for n, t in tensors.items() if views[n].any())
        views[name].copy_(tensors[name])


def test_its_own_views_are_taken_as_they_are() -> None:
    layout = BlobLayout(SHAPES)
    blob = layout.pack(filled(SHAPES), CPU)
    again = layout.pack(layout.views(blob), CPU)
    assert again.data_ptr() == blob.data_ptr() and torch.equal(again, blob)
    assert again.dtype == torch.uint8 and again.shape == (layout.nbytes,)


@pytest.mark.parametrize("foreign", ["alone", "dtype", "one of another", "shifted", "transposed", "longer"])
def test_anything_else_is_copied(foreign: str) -> None:
    layout = BlobLayout(SHAPES)
    views = layout.views(layout.pack(filled(SHAPES), CPU))
    if foreign == "alone":
        views = {name: view.clone() for name, view in views.items()}
    elif foreign == "dtype":
        views["one"] = views["one"].view(torch.int32)
    elif foreign == "one of another":
        views["three"] = layout.views(layout.pack(filled(SHAPES), CPU))["three"]
    elif foreign == "shifted":
        views["four"] = views["two"].flatten()[:2].view(2, 1)
    elif foreign == "transposed":
        square = {"one": ((2, 4, 4), torch.float32)}
        layout = BlobLayout(square)
        views = layout.views(layout.pack(filled(square), CPU))
        views["one"] = views["one"].transpose(1, 2)
    else:
        blob = torch.zeros(layout.nbytes + ALIGNMENT, dtype=torch.uint8)
        views = layout.views(blob[: layout.nbytes])
    packed = layout.pack(views, CPU)
    assert packed.untyped_storage().nbytes() == layout.nbytes
    assert packed.data_ptr() not in {view.data_ptr() for view in views.values()}
    for name, view in layout.views(packed).items():
        assert torch.equal(view, views[name].to(view.dtype))


def test_a_committed_state_has_momentum_in_the_operands_precision() -> None:
    config = tiny("mac")
    wanted = state_layout(config, torch.bfloat16, torch.float32, torch.bfloat16)
    found = {n: (p.shape, p.dtype) for n, p in gpu_layout(config, torch.bfloat16).places.items()}
    assert found == wanted
    assert found["memory.0"][1] == torch.float32 and found["momentum.0"][1] == torch.bfloat16
