"""What is promised of bits: any split of the same tokens, any batch, any number of threads."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from mnemosyne.engine import layers
from mnemosyne.engine.advance import advance
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import SessionState
from mnemosyne.kernels.rules.registry import RULES
from tests.engine.models import VARIANTS, random_tokens, small_config, small_model

COMPUTE = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
BATCHES = (1, 2, 3, 5, 7, 9, 17)
FORMS = [(v, "titans") for v in VARIANTS] + [("mag", rule) for rule in RULES if rule != "titans"]
"""Block forms and rules: the forms don't know the rule, nor the rules the form."""


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(("variant", "rule"), FORMS)
def test_any_split_ends_in_the_same_state(variant, rule, compute):
    config = small_config(variant, rule=rule)
    model = small_model(config, compute)
    tokens = random_tokens(3 * config.segment + 7, seed=5)
    start = model.initial_state()
    whole = advance(model, start, tokens, chunk=config.chunk)
    assert moved(start, whole), "a memory that stays as it was proves nothing"
    rng = random.Random(1)
    for largest in (1, 5, config.chunk + 3, config.segment + 1):
        state, at = start, 0
        while at < len(tokens):
            size = rng.randint(1, largest)
            state = advance(model, state, tokens[at : at + size], chunk=config.chunk)
            at += size
        assert state.digest() == whole.digest()
    assert start.digest() == model.initial_state().digest(), "a state that went in must come out as it was"


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_size_never_grows(variant):
    config = small_config(variant)
    model = small_model(config)
    sizes = {
        advance(model, model.initial_state(), random_tokens(n, 1), chunk=16).nbytes for n in (1, 100, 500)
    }
    assert sizes == {model.initial_state().nbytes}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sessions(model: Titans, count: int) -> list[SessionState]:
    """Sessions of different tokens and lengths, each read alone, with room for tokens in the open chunk."""
    chunk = model.config.chunk
    return [
        advance(
            model,
            model.initial_state(),
            random_tokens(chunk * (1 + i % 3) + 1 + i % (chunk - 3), seed=i),
            chunk=chunk,
        )
        for i in range(count)
    ]


def check_isolation(model: Titans, states: list[SessionState], batches: tuple[int, ...]) -> None:
    """Raise AssertionError unless each session's next chunks, logits and decoded logits are the same bits
    alone and in every batch."""
    chunk = model.config.chunk
    texts = [random_tokens(2 * chunk, seed=100 + i) for i in range(len(states))]
    bare = [dataclasses.replace(s, pending=(), kinds=b"") for s in states]
    alone = [model.prefill([s], torch.tensor([t]))[0][0] for s, t in zip(bare, texts, strict=True)]
    assert all(moved(a, b) for a, b in zip(bare, alone, strict=True))
    answers = [answer(model, [s], [i])[0] for i, s in enumerate(states)]
    for size in batches:
        together = model.prefill(bare[:size], torch.tensor(texts[:size]))[0]
        assert [s.digest() for s in together] == [s.digest() for s in alone[:size]], f"prefill of {size}"
        for i, row in enumerate(answer(model, states[:size], list(range(size)))):
            assert torch.equal(row, answers[i]), f"logits of session {i} in a batch of {size}"


def answer(model: Titans, states: list[SessionState], seeds: list[int]) -> torch.Tensor:
    """`[B, 3, vocab]`: logits of the open chunk, and after each of two tokens more."""
    rows, chunks = model.open_chunk(states)
    out = [rows]
    for _ in range(2):
        out.append(model.decode(chunks, torch.tensor([7 + s for s in seeds])))
    return torch.stack(out, 1)


def moved(a: SessionState, b: SessionState) -> bool:
    return all(not torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors if n.startswith("memory."))


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_session_is_the_same_alone_and_in_any_batch(variant, compute, threads):
    model = small_model(small_config(variant, dim=256), compute)
    check_isolation(model, sessions(model, max(BATCHES)), BATCHES)


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "titans"])
def test_every_rule_is_the_same_alone_and_in_any_batch(rule, threads):
    model = small_model(small_config("mag", dim=256, rule=rule))
    check_isolation(model, sessions(model, max(BATCHES)), BATCHES)


def test_a_gemm_whose_bits_depend_on_the_batch_is_caught(monkeypatch):
    """The last 1e-7 of a product moves with the number of its rows, as a library's choice of kernel does."""
    model = small_model(small_config("mag", dim=256))
    states = sessions(model, 3)

    class Wrong:
        pad = staticmethod(F.pad)
        silu = staticmethod(F.silu)

        @staticmethod
        def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.linear(x, weight) * (1 + 1e-7 * (x.shape[0] // 64))

    monkeypatch.setattr(layers, "F", Wrong)
    with pytest.raises(AssertionError, match="prefill of 2"):
        check_isolation(model, states, (1, 2, 3))
