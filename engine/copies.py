"""States copied between the device and host memory, beside the computation. Owns streams, events and the form
of a copy; doesn't decide what is copied, and knows no session.

A state whose tensors are the views of one allocation (``gpu.blob``) is one copy; any other is copied tensor
by tensor into one allocation, and comes back as its views. Host memory is pinned, which is slow to get:
torch's allocator for it keeps what was freed and gives it out again, in powers of two.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from mnemosyne.engine.gpu.blob import BlobLayout, Shapes

Tensors = Mapping[str, Tensor]


class Copy(Protocol):
    """A copy that was begun. The source is to be kept until it has ended."""

    @property
    def tensors(self) -> Tensors:
        """The new ones; their values are there once it has ended."""
        ...

    @property
    def seconds(self) -> float:
        """How long it took, once it has ended."""
        ...

    def ended(self) -> bool: ...

    def wait(self) -> None:
        """Return when it has ended."""
        ...


class Copier(Protocol):
    """Copies states out of the device and back. May raise torch.OutOfMemoryError, having begun nothing."""

    def host_bytes(self, nbytes: int) -> int:
        """What a state of ``nbytes`` takes of host memory."""
        ...

    def out(self, tensors: Tensors) -> Copy: ...

    def back(self, tensors: Tensors) -> Copy: ...


class Placed:
    """A copy that ended when it was made."""

    def __init__(self, tensors: Tensors, seconds: float) -> None:
        self.tensors, self.seconds = tensors, seconds

    def ended(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class Streamed:
    """A copy on a stream of its own."""

    def __init__(self, tensors: Tensors, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self.tensors, self._begin, self._end = tensors, begin, end

    @property
    def seconds(self) -> float:
        return self._begin.elapsed_time(self._end) / 1000

    def ended(self) -> bool:
        return self._end.query()

    def wait(self) -> None:
        self._end.synchronize()


class PlainCopier:
    """Between two places of the same memory, at once: what there is without a device of its own."""

    def host_bytes(self, nbytes: int) -> int:
        return nbytes

    @torch.inference_mode()
    def out(self, tensors: Tensors) -> Copy:
        began = time.perf_counter()
        layout = _layout(tensors)
        made = _fill(layout, layout.empty(torch.device("cpu")), tensors)
        return Placed(made, time.perf_counter() - began)

    back = out


class CudaCopier:
    """Between a CUDA device and pinned memory; out and back have a stream each, as the bus has two ways."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def host_bytes(self, nbytes: int) -> int:
        return 1 << (nbytes - 1).bit_length()

    @torch.inference_mode()
    def out(self, tensors: Tensors) -> Copy:
        layout = _layout(tensors)
        return self._begin(
            layout, torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=True), tensors, self._out
        )

    @torch.inference_mode()
    def back(self, tensors: Tensors) -> Copy:
        layout = _layout(tensors)
        return self._begin(layout, layout.empty(self._device), tensors, self._back)

    def _begin(self, layout: BlobLayout, target: Tensor, tensors: Tensors, stream: torch.cuda.Stream) -> Copy:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # What computes has made the source, and may have used the target's memory before.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            begin.record(stream)
            made = _fill(layout, target, tensors)
            end.record(stream)
        return Streamed(made, begin, end)


def copier_for(device: torch.device) -> Copier:
    return CudaCopier(device) if device.type == "cuda" else PlainCopier()


def _layout(tensors: Tensors) -> BlobLayout:
    shapes: Shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return BlobLayout(shapes)


def _fill(layout: BlobLayout, target: Tensor, tensors: Tensors) -> Tensors:
    """``tensors`` as views of ``target`` `[nbytes]` uint8."""
    views = layout.views(target)
    blob = layout.blob_of(tensors)
    if blob is not None:
        target.copy_(blob, non_blocking=True)
    else:
        for name, view in views.items():
            view.copy_(tensors[name], non_blocking=True)
    return views
