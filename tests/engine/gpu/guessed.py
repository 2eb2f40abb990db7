"""Steps begun ahead of their tokens beside steps that were not: the same bits, whatever tokens come."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mnemosyne.engine.gpu import ahead
from mnemosyne.engine.gpu.decode import Decoder
from mnemosyne.engine.gpu.open_cache import BlobChunk
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.model import Titans
from mnemosyne.engine.open_chunk import OpenChunk
from tests.engine.gpu.opened import blob_chunk

NEVER = 1 << 20
TOGETHER = [[0, 1]] * 5 + [[0, 1, 2]] * 3 + [[2, 1], [2]] + [[2, 3]] * 3 + [[3]]
"""Who takes part in each step."""
OTHERS = {3, 6, 10}
"""Steps after which the first one's token isn't the largest logit's."""


def check_steps_begun_ahead(
    monkeypatch: pytest.MonkeyPatch, model: Titans, opened: Sequence[OpenChunk], *, graphs: bool
) -> None:
    """``opened``: four sessions, none nearer than 9 tokens to its chunk's end."""
    begun: list[int] = []

    def answers(after: int) -> list[Tensor]:
        monkeypatch.setattr(ahead, "AFTER", after)
        decoder = Decoder(model.config, Weights.of(model), graphs=graphs)
        taken, take = [], decoder._ahead.take

        def counted(chunks: Sequence[BlobChunk], ids: list[int]) -> Tensor | None:
            logits = take(chunks, ids)
            taken.append(logits is not None)
            return logits

        monkeypatch.setattr(decoder._ahead, "take", counted)
        chunks: dict[int, BlobChunk] = {b: blob_chunk(model, chunk) for b, chunk in enumerate(opened)}
        newest = [b + 1 for b in range(len(opened))]
        found, given = [], []
        for step, who in enumerate(TOGETHER):
            for gone in [b for b in chunks if not any(b in later for later in TOGETHER[step:])]:
                # Given up while a step that was begun may still run.
                size = chunks.pop(gone).blob.numel()
                gc.collect()
                given.append(torch.full((size,), 255, dtype=torch.uint8, device=model.device))
            logits = decoder.decode([chunks[b] for b in who], torch.tensor([newest[b] for b in who]))
            found.append(logits.cpu())
            for b, row in zip(who, found[-1], strict=True):
                newest[b] = int(row.argmax())
            if step in OTHERS:
                newest[who[0]] = (newest[who[0]] + 1) % model.config.vocab_size
        begun.append(sum(taken))
        del decoder
        gc.collect()
        assert given and all(bool((memory == 255).all()) for memory in given)
        return found

    plain = answers(NEVER)
    for after in (0, 2):
        for found, want in zip(answers(after), plain, strict=True):
            assert torch.equal(found, want)
    never, always, late = begun
    assert never == 0 and always > late > 0
