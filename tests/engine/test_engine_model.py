"""The engine over small real models: alone, together, split and resumed must be the same bits."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.engine.advance import advance
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.messages import INITIAL, Advance, Event, Failed, Finished, Generate, Sampling
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.state import SessionState
from tests.engine.fakes import INFO
from tests.engine.models import VARIANTS, random_tokens, small_config, small_model


class Held:
    """An engine whose states can be looked at."""

    def __init__(self, variant: str) -> None:
        self.model = small_model(small_config(variant))  # type: ignore[arg-type]
        self.states: list[SessionState] = []
        self.engine = Engine(self.model, INFO, Limits(), self._dump, lambda data: self.states[int(data)])

    def _dump(self, state: SessionState) -> bytes:
        self.states.append(state)
        return str(len(self.states) - 1).encode()

    def run(self, *requests: Advance | Generate) -> list[Event]:
        events = [event for request in requests for event in self.engine.accept(request)]
        while not self.engine.idle:
            events += self.engine.step()
        assert not [event for event in events if isinstance(event, Failed)]
        return events

    def state(self, handle: str) -> SessionState:
        slot = self.engine._desk._slots[handle]
        assert slot.state is not None
        return slot.state


def turn(i: int, max_tokens: int = 24) -> Generate:
    return Generate(
        request_id=f"g{i}",
        tenant=f"t{i % 3}",
        base=INITIAL,
        result=f"h{i}",
        prompt=tuple(random_tokens(5 + 17 * i, seed=i)),
        sampling=Sampling(max_tokens=max_tokens, seed=i),
    )


def tokens_of(events: list[Event], request_id: str) -> tuple[int, ...]:
    return next(e.tokens for e in events if isinstance(e, Finished) and e.request_id == request_id)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_session_is_the_same_alone_and_in_a_batch(variant: str) -> None:
    many = 5
    together = Held(variant)
    events = together.run(*(turn(i) for i in range(many)))
    for i in range(many):
        alone = Held(variant)
        tokens = tokens_of(alone.run(turn(i)), f"g{i}")
        assert tokens == tokens_of(events, f"g{i}")
        assert alone.state(f"h{i}").digest() == together.state(f"h{i}").digest()
        start = alone.model.initial_state().tensors["memory.0"]
        assert not torch.equal(start, alone.state(f"h{i}").tensors["memory.0"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_answer_in_pieces_is_the_answer_in_one(variant: str) -> None:
    held = Held(variant)
    whole = tokens_of(held.run(turn(2, max_tokens=40)), "g2")
    prompt = turn(2).prompt
    base, emitted, number = INITIAL, (), 0
    for count in (1, 14, 16, 9):
        request = Generate(
            request_id=f"p{number}",
            tenant="",
            base=base,
            result=f"r{number}",
            prompt=prompt if base == INITIAL else (),
            sampling=Sampling(max_tokens=count, seed=2),
        )
        emitted += tokens_of(held.run(request), f"p{number}")
        base, number = f"r{number}", number + 1
    assert emitted == whole
    assert held.state(base).digest() == held.state("h2").digest()


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_through_the_engine_is_advance(variant: str) -> None:
    held = Held(variant)
    tokens = tuple(random_tokens(16 * 19 + 3, seed=7))
    base = INITIAL
    for i, (start, end) in enumerate([(0, 1), (1, 130), (130, 130), (130, 147), (147, len(tokens))]):
        request = Advance(request_id=str(i), tenant="", base=base, result=f"a{i}", tokens=tokens[start:end])
        held.run(request, turn(i))
        base = f"a{i}"
    model = held.model
    expected = advance(model, model.initial_state(), tokens, chunk=model.config.chunk)
    assert held.state(base).digest() == expected.digest()
