"""A device with room for so many states and no more, on a CPU: states that were made or brought there count
while anybody refers to them, and a step on one that isn't there fails the test."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from mnemosyne.engine.copies import Copy, PlainCopier, Tensors
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.tiers import Budgets
from mnemosyne.engine.trace import Trace
from tests.engine.fakes import INFO, FakeModel, dump, load

NBYTES = 32
"""What a state of the fake model takes."""


class Device:
    def __init__(self, states: int = 1_000_000) -> None:
        self.states = states
        self.chunks = 1_000_000
        """Rows of chunks of one step, for which there is room."""
        self.open = 1_000_000
        """Unfinished chunks for which there is room."""
        self._live: dict[int, weakref.ref[Tensor]] = {}
        self._open: weakref.WeakSet[OpenChunk] = weakref.WeakSet()
        self.most = 0

    @property
    def live(self) -> int:
        return len(self._live)

    @property
    def opened_now(self) -> int:
        return len(self._open)

    def take(self, states: int) -> None:
        if self.live + states > self.states:
            raise torch.OutOfMemoryError(f"{self.live} states of {self.states}, and {states} more")

    def place(self, tensors: Tensors) -> None:
        tensor = tensors["memory.0"]
        key = id(tensor)
        self._live[key] = weakref.ref(tensor, lambda _: self._live.pop(key, None))
        self.most = max(self.most, self.live)

    def check(self, states: Sequence[SessionState]) -> None:
        assert all(id(state.tensors["memory.0"]) in self._live for state in states), "not on the device"

    def opened(self, chunks: Sequence[OpenChunk]) -> None:
        if len(self._open) + len(chunks) > self.open:
            raise torch.OutOfMemoryError(f"{len(self._open)} open chunks, and {len(chunks)} more")
        self._open.update(chunks)


class DeviceModel(FakeModel):
    """The fake model on such a device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def initial_state(self) -> SessionState:
        state = super().initial_state()
        self.device.place(state.tensors)
        return state

    def prefill(
        self, states: Sequence[SessionState], tokens: Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace]:
        self.device.check(states)
        self.device.take(len(states))
        if len(states) * tokens.shape[1] // self.config.chunk > self.device.chunks:
            raise torch.OutOfMemoryError("too many chunks")
        after, trace = super().prefill(states, tokens, per_token)
        for state in after:
            self.device.place(state.tensors)
        return after, trace

    def open_chunk(self, states: Sequence[SessionState]) -> tuple[Tensor, list[OpenChunk]]:
        self.device.check(states)
        logits, chunks = super().open_chunk(states)
        self.device.opened(chunks)
        return logits, chunks

    def decode(self, chunks: Sequence[OpenChunk], tokens: Tensor) -> Tensor:
        self.device.check([chunk.committed for chunk in chunks])
        return super().decode(chunks, tokens)


class Slow:
    """A copy that ends when it was waited for, or after it was asked ``polls`` times."""

    def __init__(self, tensors: Tensors, polls: int) -> None:
        self.tensors, self.seconds, self._polls = tensors, 0.5, polls

    def ended(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def wait(self) -> None:
        self._polls = 0


class DeviceCopier(PlainCopier):
    def __init__(self, device: Device, polls: int = 0) -> None:
        self._device, self._polls = device, polls
        self.pinned = 1_000_000
        """States for which there is memory to pin."""
        self.outs = self.backs = 0

    def out(self, tensors: Tensors) -> Copy:
        if self.outs >= self.pinned:
            raise RuntimeError("no memory to pin")
        self.outs += 1
        return Slow(super().out(tensors).tensors, self._polls)

    def back(self, tensors: Tensors) -> Copy:
        self._device.take(1)
        made = super().out(tensors).tensors
        self._device.place(made)
        self.backs += 1
        return Slow(made, self._polls)


def device_engine(
    device: Device, *, on_device: int, on_host: int, copier: DeviceCopier | None = None, **limits: float
) -> Engine:
    """Budgets in states."""
    budgets = Budgets(device=on_device * NBYTES, host=on_host * NBYTES)
    return Engine(
        DeviceModel(device),
        INFO,
        Limits(**limits),  # type: ignore[arg-type]
        dump,
        load,
        budgets,
        copier or DeviceCopier(device),
    )
