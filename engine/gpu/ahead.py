"""A step of decoding begun before its tokens are known, so that the device doesn't wait while the host draws
them: each session's next token is taken to be its largest logit's.

Owns the stream that such a step runs on, whether it is worth while, and what takes it back where a token was
another one, or a session is gone. Logits are those of a step that wasn't begun ahead. Knows no kernel, no
request and no sampling.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnemosyne.engine.gpu.blob import BlobLayout
from mnemosyne.engine.gpu.open_cache import BlobChunk, overwritten_bytes

FEW = 4
"""Sessions whose step is begun ahead; the host takes little of a step of more, and they come and go: each
commit of one is a change of who decodes."""
AFTER = 32
"""Steps one after the other whose tokens were all the largest logits'. A step taken back costs as much as is
won by 15 or so, so where tokens are drawn at random none is begun."""


class _Begun(NamedTuple):
    chunks: Sequence[weakref.ref[BlobChunk]]
    """Not kept: they are whose step it is."""
    logits: Tensor | None
    """`[B, vocab]` after the tokens that were guessed; None: only guessed."""


class Ahead:
    def __init__(self, layout: BlobLayout, device: torch.device) -> None:
        """``layout`` of open chunks."""
        on_gpu = device.type == "cuda"
        self._device = device
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._guess = torch.zeros(FEW, dtype=torch.int64, device=device)
        self._told = torch.zeros(FEW, dtype=torch.int64, pin_memory=on_gpu)
        self._before = torch.empty(FEW, overwritten_bytes(layout), dtype=torch.uint8, device=device)
        """Of each chunk, what the step overwrites."""
        self._guessed, self._ended = (torch.cuda.Event() if on_gpu else None for _ in range(2))
        if self._stream is not None:
            # What a last step still uses isn't given to others before its end.
            weakref.finalize(self, self._stream.synchronize).atexit = False
        self._right = 0
        """Steps since a guess was wrong, or others decoded."""
        self._goes_on = False
        """The newest logits are of a step on the stream."""
        self._begun: _Begun | None = None

    def take(self, chunks: Sequence[BlobChunk], ids: list[int]) -> Tensor | None:
        """Logits after ``ids`` on ``chunks``, where just that was begun. Otherwise it is as if nothing had
        been: what comes on the current stream may use the chunks, and a step's room."""
        begun, self._begun = self._begun, None
        self._goes_on = False
        if self._ended is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ended)
        if begun is None:
            return None
        same = [chunk() for chunk in begun.chunks] == list(chunks)
        if same:
            if self._guessed is not None:
                self._guessed.synchronize()
            same = self._told[: len(ids)].tolist() == ids
            self._right = self._right + 1 if same else 0
        if begun.logits is None:
            return None
        if same:
            if self._stream is not None:
                begun.logits.record_stream(torch.cuda.current_stream(self._device))
            self._goes_on = True
            return begun.logits
        self._right = 0
        for known, before in zip(begun.chunks, self._before, strict=False):
            chunk = known()
            if chunk is not None:
                chunk.blob[: len(before)].copy_(before)
        return None

    def begin(
        self, chunks: Sequence[BlobChunk], logits: Tensor, step: Callable[[Tensor], Tensor] | None
    ) -> None:
        """After ``logits`` `[B, vocab]`, the newest of ``chunks``: guess what is drawn, and where that is
        worth while let ``step`` take the guess `[B]` in, and give the next logits. None: no room for it."""
        if len(chunks) > FEW:
            return
        guess, found = self._guess[: len(chunks)], None
        if self._stream is not None:
            logits.record_stream(self._stream)
            if not self._goes_on:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                torch.argmax(logits, 1, out=guess)
                self._told[: len(chunks)].copy_(guess, non_blocking=True)
                if self._guessed is not None:
                    self._guessed.record()
                if step is not None and self._right >= AFTER:
                    self._keep(chunks)
                    found = step(guess)
        except torch.OutOfMemoryError:
            self._right = 0  # the next try does without
            raise
        finally:
            if self._ended is not None:
                self._ended.record(self._stream)
        self._begun = _Begun([weakref.ref(chunk) for chunk in chunks], found)

    def _keep(self, chunks: Sequence[BlobChunk]) -> None:
        """What the step overwrites; and memory that is given up meanwhile isn't given away before its end."""
        for chunk, before in zip(chunks, self._before, strict=False):
            before.copy_(chunk.blob[: len(before)])
            if self._stream is not None:
                for blob in (chunk.state_blob, chunk.blob):
                    blob.record_stream(self._stream)
