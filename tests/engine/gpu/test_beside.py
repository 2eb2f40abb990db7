"""Commits on a stream of their own beside decode, on a GPU: the tokens of each session alone, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from mnemosyne.engine.config import Variant
from mnemosyne.engine.runner import Decoding, Runner
from mnemosyne.engine.state import SessionState
from tests.engine.gpu.compared import same_bits, told_of
from tests.engine.gpu.test_waves import check_same, pending, standing, text, usual
from tests.engine.models import VARIANTS

if TYPE_CHECKING:
    from mnemosyne.engine.gpu.model import GpuTitans

LENGTHS = (64, 64, 64, 63, 61, 60, 50, 40, 33, 17, 5, 1)
"""Tokens in the chunks of sessions: three are full at the first step, and none fill up for a while."""
STEPS = 70
DROPPED = 4
"""Is cancelled while its chunk is being committed."""


class Life:
    """What came of a session: its tokens, the bits of its logits, its turns missed."""

    def __init__(self, state: SessionState) -> None:
        self.row = Decoding(state)
        self.tokens: list[int] = []
        self.logits: list[bytes] = []
        self.missed = 0


def lives(gpu: GpuTitans, states: list[SessionState], *, dropped: int | None = None) -> list[Life]:
    """``STEPS`` tokens of each, but of the ``dropped`` one, the largest logit's. After every step the memory
    that it gave back is filled with NaN."""
    runner, made = Runner(gpu), [Life(state) for state in states]
    for _ in range(20 * STEPS):
        going = [life for life in made if len(life.tokens) < STEPS]
        if not going:
            break
        for life, outcome in zip(going, runner.decode([life.row for life in going]), strict=True):
            assert not isinstance(outcome, Exception), outcome
            if outcome is None:
                life.missed += 1
                continue
            life.logits.append(outcome.tobytes())
            life.tokens.append(int(outcome.argmax()))
            life.row.next = life.tokens[-1]
        if dropped is not None and made[dropped].row.committing:
            assert runner.committing
            del made[dropped]
            dropped = None
        free = [torch.empty_like(state_blob(gpu, states[0])) for _ in range(4)]
        for blob in free:
            blob.fill_(255)
    else:
        raise AssertionError("sessions don't come to an end")
    assert dropped is None
    runner.decode([])
    assert not runner.committing
    return made


def state_blob(gpu: GpuTitans, state: SessionState) -> torch.Tensor:
    return gpu.layout.pack(state.tensors, gpu.device)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_sessions_whose_chunks_fill_up_decode_as_alone(variant: Variant) -> None:
    gpu = usual(variant)
    states = [
        pending(state, length - length // 3, length // 3)
        for state, length in zip(standing(gpu, len(LENGTHS)), LENGTHS, strict=True)
    ]
    before = [state.digest() for state in states]
    alone = [lives(gpu, [state])[0] for state in states]
    assert not any(life.missed for life in alone), "with nobody else a commit is waited for"
    together = lives(gpu, states, dropped=DROPPED)
    assert any(life.missed for life in together), "no commit was under way beside others"
    del alone[DROPPED]
    for got, want in zip(together, alone, strict=True):
        assert got.tokens == want.tokens and got.logits == want.logits
        assert same_bits(got.row.state, want.row.state)
    assert [state.digest() for state in states] == before


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_commit_has_the_bits_of_prefill_beside_whatever_else_is_computed(variant: Variant) -> None:
    gpu = usual(variant)
    states = standing(gpu, 2 * gpu.beside + 4)
    tokens = text(len(states), 1, seed=11)
    want = [gpu.prefill([state], tokens[b : b + 1]) for b, state in enumerate(states)]
    _, opened = gpu.open_chunk([pending(state, 1) for state in states[:8]])
    first = 0
    for count in (1, 3, 16, gpu.beside, gpu.beside):
        which = range(first % 8, first % 8 + count)
        commit = gpu.commit_beside([states[b] for b in which], tokens[list(which)])
        gpu.decode(opened, torch.arange(8))
        gpu.prefill(states[:5], text(5, 9, seed=12))
        got, told = commit.result()
        for at, b in enumerate(which):
            check_same([got[at]], told_of(told, [at]), *want[b])
        first += count
