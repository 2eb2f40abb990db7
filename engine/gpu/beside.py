"""Full chunks committed on a stream of their own, beside what the device does otherwise: the chunk of one
session, which goes through the layers one after the other, leaves most of it idle.

Owns the stream, and the room that is used on it alone. States are others': the allocator is told that this
stream uses them, so that, whatever becomes of a session, their memory isn't given away before the commit has
ended. Knows no row and no request.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.blob import BlobLayout
from mnemosyne.engine.gpu.reading import Reader, Told
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace

SESSIONS = 32
"""Most of a commit. Of sessions that fill their chunks together more than these go on apart."""


class Beside:
    def __init__(
        self, config: ModelConfig, weights: Weights, layout: BlobLayout, opened: BlobLayout, *, graphs: bool
    ) -> None:
        self._layout = layout
        self._device = weights.output.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        chunk = config.chunk
        # Made on the stream: memory that it alone uses, and takes over in order when this is gone.
        with torch.cuda.stream(self._stream):
            self._reader = Reader(
                config,
                weights,
                layout,
                opened,
                SESSIONS * chunk,
                {chunk: SESSIONS},
                graphs=graphs,
                lanes=1,
            )
        self._newest: weakref.ref[Streamed] | None = None
        """Not kept: its states, old and new, are those of whoever waits for it."""

    def commit(self, states: Sequence[SessionState], tokens: Tensor) -> Streamed:
        """Of one chunk `[B, chunk]`, on the host, B no more than ``SESSIONS``. The one before has ended."""
        made = Streamed(self._reader, self._stream, self._layout, self._device, states, tokens)
        self._newest = weakref.ref(made)
        return made

    def launch(self) -> None:
        """Give the device what was begun, if it doesn't have it yet."""
        newest = None if self._newest is None else self._newest()
        if newest is not None:
            newest.launch()
        self._newest = None


class Streamed:
    """A commit on its way: begun when it is made, launched at the latest when its result is asked for."""

    def __init__(
        self,
        reader: Reader,
        stream: torch.cuda.Stream | None,
        layout: BlobLayout,
        device: torch.device,
        states: Sequence[SessionState],
        tokens: Tensor,
    ) -> None:
        """``stream``: None where the device has none, and computes at once."""
        self._reader, self._stream, self._layout = reader, stream, layout
        self._states, self._tokens = states, tokens
        self._before = [layout.pack(state.tensors, device) for state in states]
        self._after = [layout.empty(device) for _ in states]
        self._ready = self._end = None
        if stream is not None:
            for blob in (*self._before, *self._after):
                blob.record_stream(stream)
            # What comes later on the stream that computes isn't waited for.
            self._ready, self._end = torch.cuda.Event(), torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(device))
        self._launched = False
        self._told: Told | None = None
        self._error: Exception | None = None

    @torch.inference_mode()
    def launch(self) -> None:
        """Once. What it raises is told by ``result``: whoever launches may be about something else."""
        if self._launched:
            return
        self._launched = True
        try:
            with torch.cuda.stream(self._stream):
                if self._stream is not None and self._ready is not None:
                    self._stream.wait_event(self._ready)
                for new, old in zip(self._after, self._before, strict=True):
                    new.copy_(old)
                positions = [state.position for state in self._states]
                self._told = self._reader.read(self._after, positions, self._tokens).on_host()
                if self._end is not None:
                    self._end.record(self._stream)
        except Exception as error:
            self._error = error

    def ended(self) -> bool:
        if self._error is not None:
            return True
        return self._told is not None and (self._end is None or self._end.query())

    @torch.inference_mode()
    def result(self) -> tuple[list[SessionState], Trace]:
        self.launch()
        error, self._error = self._error, None
        if error is not None:
            raise error
        assert self._told is not None
        if self._end is not None:
            self._end.synchronize()
        trace = self._told.trace()
        return [
            dataclasses.replace(
                state,
                position=state.position + self._tokens.shape[1],
                tensors=self._layout.views(blob),
                pyramid=state.pyramid.extended(chunks),
            )
            for state, blob, chunks in zip(self._states, self._after, trace.chunks, strict=True)
        ], trace
