"""The loss of every token of whole chunks, against the logits that decode and open chunks answer with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mnemosyne.engine.advance import advance
from mnemosyne.engine.state import GENERATED, SessionState
from tests.engine.models import VARIANTS, random_tokens, small_config, small_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_decodes_logits(variant):
    config = small_config(variant, dim=16)
    model, chunk = small_model(config, torch.float64), config.chunk
    before, tokens = random_tokens(2 * chunk, seed=1), random_tokens(2 * chunk + 1, seed=2)
    start = advance(model, model.initial_state(), [*before, 0], chunk=chunk)
    start = SessionState(start.position, start.tensors, pyramid=start.pyramid)
    blank = model.initial_state()
    after, losses = model.losses([start, blank], torch.tensor([tokens, tokens]))
    for state, row, ended in zip((start, blank), losses, after, strict=True):
        assert row.shape == (2 * chunk,)
        for first in (0, chunk):
            opened = SessionState(state.position, state.tensors, (tokens[first],), bytes([GENERATED]))
            logits, open_chunks = model.open_chunk([opened])
            for i in range(first, first + chunk):
                expected = F.cross_entropy(logits, torch.tensor([tokens[i + 1]]))
                assert abs(float(row[i] - expected)) < 1e-8
                if i + 1 < first + chunk:
                    logits = model.decode(open_chunks, torch.tensor([tokens[i + 1]]))
            state = model.prefill([state], torch.tensor([tokens[first : first + chunk]]))[0][0]
        # Two chunks in one call and one after the other are the same state.
        assert ended.digest() == state.digest()
    assert (losses[0] - losses[1]).abs().max() > 1e-3  # what was read before matters
