"""Full chunks committed beside the decode of others, with a model whose commits end when they are told to."""

from __future__ import annotations

import dataclasses
import random
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mnemosyne.engine.commits import Made
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.messages import (
    INITIAL,
    Cancel,
    Event,
    Export,
    Exported,
    Failed,
    Finished,
    Progress,
    Release,
    Token,
)
from mnemosyne.engine.runner import Decoding, Runner
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.state import GENERATED, SessionState
from mnemosyne.engine.tiers import Budgets
from mnemosyne.engine.trace import Trace
from tests.engine.fakes import BOMB, CHUNK, INFO, POISON, FakeModel, dump, fake_engine, load
from tests.engine.small_device import NBYTES, Device, DeviceCopier, DeviceModel
from tests.engine.test_engine import answer, drain, expected, exported, ids, last, of, read

torch.set_num_threads(1)


class Slow:
    """A commit that ends when ``told`` is set, or when it is waited for."""

    def __init__(self, sessions: int, made: Made | None, error: Exception | None) -> None:
        self.sessions, self.told, self.waited = sessions, False, False
        self._made, self._error = made, error

    def ended(self) -> bool:
        return self.told

    def result(self) -> tuple[list[SessionState], Trace]:
        self.waited = not self.told
        if self._error is not None:
            raise self._error
        made, self._made = self._made, None
        assert made is not None
        return made.result()


class SlowModel(FakeModel):
    def __init__(self) -> None:
        super().__init__()
        self.commits: list[Slow] = []

    def commit_beside(self, states: Sequence[SessionState], tokens: Tensor) -> Slow:  # type: ignore[override]
        made = error = None
        try:
            made = super().commit_beside(states, tokens)
        except RuntimeError as raised:
            error = raised
        assert all(c.told or c.waited for c in self.commits), "one at a time"
        self.commits.append(Slow(len(states), made, error))
        return self.commits[-1]


class SlowDeviceModel(SlowModel, DeviceModel):
    def __init__(self, device: Device) -> None:
        DeviceModel.__init__(self, device)
        self.commits = []


def alone(*args: object, **sampling: object) -> tuple[int, ...]:
    end = drain(fake_engine(), answer(*args, **sampling))[-1]  # type: ignore[arg-type]
    assert isinstance(end, Finished)
    return end.tokens


def emitted(events: Sequence[Event], request_id: str) -> tuple[int, ...]:
    return tuple(event.token for event in of(events, request_id) if isinstance(event, Token))


def begun(
    model: SlowModel, *lengths: int, max_tokens: int = 30, **limits: float
) -> tuple[Engine, list[Event]]:
    """An answer to a prompt of each length, stepped until the first full chunk is on its way."""
    engine, events = fake_engine(model, **limits), []
    for i, length in enumerate(lengths):
        engine.accept(answer(f"g{i}", INITIAL, f"h{i}", ids(length, i), max_tokens=max_tokens))
    while not model.commits:
        events += engine.step()
    return engine, events


def check_all(engine: Engine, events: Sequence[Event], *lengths: int, max_tokens: int = 30) -> None:
    for i, length in enumerate(lengths):
        want = alone("g", INITIAL, None, ids(length, i), max_tokens=max_tokens)
        end = last(events, f"g{i}")
        assert isinstance(end, Finished) and end.tokens == want and emitted(events, f"g{i}") == want
        kinds = bytes(length) + bytes([GENERATED]) * max_tokens
        assert exported(engine, f"h{i}") == expected(ids(length, i) + want, kinds)
        told = [c.position for e in of(events, f"g{i}") if isinstance(e, Progress) for c in e.trace]
        assert told == list(range(CHUNK, length + max_tokens, CHUNK)), "every chunk once"


def test_others_go_on_while_a_chunk_is_committed() -> None:
    model = SlowModel()
    engine, events = begun(model, 4, 1)
    assert [len(emitted(events, f"g{i}")) for i in range(2)] == [1, 2], "the first has missed a turn"
    events += engine.step()
    assert [len(emitted(events, f"g{i}")) for i in range(2)] == [1, 3]
    assert [len(model.commits), model.commits[0].sessions, model.decodes[-1]] == [1, 1, 1]
    model.commits[0].told = True
    events += engine.step()
    assert [len(emitted(events, f"g{i}")) for i in range(2)] == [2, 4]
    assert model.decodes[-1] == 2 and not model.commits[0].waited
    check_all(engine, events + drain(engine), 4, 1)


def test_with_nobody_else_it_is_waited_for_in_the_same_step() -> None:
    model = SlowModel()
    engine = fake_engine(model)
    engine.accept(answer("g", INITIAL, None, ids(3), max_tokens=40))
    for _ in range(40):
        assert any(isinstance(event, Token) for event in engine.step())
    assert engine.idle and len(model.commits) == 10 and all(c.waited for c in model.commits)


def test_those_who_read_do_not_keep_a_lone_answer_from_going_on() -> None:
    model = SlowModel()
    engine = fake_engine(model)
    drain(engine, read("b", INITIAL, "b", ids(3)))
    engine.accept(read("r", INITIAL, "a", ids(4000)))
    engine.accept(answer("g", "b", None, (), max_tokens=20))
    for _ in range(20):
        events = engine.step()
        assert any(isinstance(event, Token) for event in events)
        assert any(isinstance(event, Progress) and event.request_id == "r" for event in events)


def test_chunks_that_fill_together_are_committed_together_up_to_what_there_is_room_for() -> None:
    model = SlowModel()
    model.beside = 4
    lengths = (3,) * 6
    engine, events = begun(model, *lengths)
    # Nobody could go on but by waiting for the first four; then they decode while the rest is committed.
    assert [c.sessions for c in model.commits] == [4, 2] and model.commits[0].waited
    assert model.decodes[-1] == 4
    events += engine.step()
    assert [c.sessions for c in model.commits] == [4, 2] and model.decodes[-1] == 4
    model.commits[1].told = True
    events += engine.step()
    assert model.decodes[-1] == 6
    check_all(engine, events + drain(engine), *lengths)


def test_what_fills_up_meanwhile_is_the_next_commit() -> None:
    model = SlowModel()
    engine, events = begun(model, 3, 2, 2, 1)
    events += engine.step()  # in which the second and the third have filled up
    assert len(model.commits) == 1 and model.decodes[-1] == 1
    model.commits[0].told = True
    events += engine.step()
    assert [c.sessions for c in model.commits] == [1, 3] and model.decodes[-1] == 1
    check_all(engine, events + drain(engine), 3, 2, 2, 1)


@pytest.mark.parametrize("told", [True, False])
def test_one_that_is_cancelled_meanwhile_leaves_nothing(told: bool) -> None:
    model = SlowModel()
    engine, events = begun(model, 3, 1)
    made = model.commits[0]._made
    assert made is not None
    new = weakref.ref(made.states[0].tensors["memory.0"])
    del made
    model.commits[0].told = told
    (end,) = engine.accept(Cancel(request_id="g0"))
    assert isinstance(end, Failed) and end.error == "Cancelled"
    if told:
        rest = drain(engine)
        want = alone("g", INITIAL, None, ids(1, 1), max_tokens=30)
        assert emitted(events + rest, "g1") == want and not of(rest, "g0")
    else:
        engine.accept(Cancel(request_id="g1"))
        assert not engine.idle, "what is under way is let go when it has ended"
        assert engine.step() == [] and model.commits[0].waited
    assert engine.idle
    model.commits.clear()
    assert new() is None


def test_a_session_is_kept_and_dropped_as_ever_meanwhile() -> None:
    """The base of an answer is exported and released while the answer's chunk is being committed."""
    model = SlowModel()
    engine = fake_engine(model)
    drain(engine, read("r", INITIAL, "base", ids(11)))
    engine.accept(answer("g0", "base", "after", (), max_tokens=9))
    engine.accept(answer("g1", INITIAL, None, ids(1), max_tokens=30))
    events: list[Event] = []
    while not model.commits:
        events += engine.step()
    engine.accept(Export(request_id="e", handle="base"))
    engine.accept(Release(handle="base"))
    events += engine.step()
    data = last(events, "e")
    assert isinstance(data, Exported) and data.data == expected(ids(11))
    assert not model.commits[0].told
    drain(engine)
    tokens = alone("g", INITIAL, None, ids(11), max_tokens=9)
    assert exported(engine, "after") == expected(ids(11) + tokens, bytes(11) + bytes([GENERATED]) * 9)


def test_a_memory_that_breaks_on_its_way_fails_that_session_alone() -> None:
    model = SlowModel()
    engine = fake_engine(model)
    drain(engine, read("r", INITIAL, "base", ids(5)))
    engine.accept(answer("bad", "base", "x", (1, POISON), max_tokens=9))
    engine.accept(answer("good", "base", None, (1, 2), max_tokens=9))
    engine.accept(answer("other", INITIAL, None, ids(1), max_tokens=9))
    events: list[Event] = []
    while not model.commits:
        events += engine.step()
    assert model.commits[0].sessions == 2
    model.commits[0].told = True
    events += drain(engine)
    failed = last(events, "bad")
    assert isinstance(failed, Failed) and failed.error == "NotFinite"
    assert emitted(events, "good") == alone("g", INITIAL, None, ids(5) + (1, 2), max_tokens=9)
    assert emitted(events, "other") == alone("g", INITIAL, None, ids(1), max_tokens=9)
    assert exported(engine, "base") == expected(ids(5)), "the last good one"


@pytest.mark.parametrize("early", [True, False])
def test_a_commit_that_raises_fails_the_session_at_fault_alone(
    early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early: it couldn't even be begun."""
    model = SlowModel()
    if early:
        monkeypatch.setattr(model, "commit_beside", lambda *args: FakeModel.commit_beside(model, *args))
    explode = model._explode
    armed = False

    def late(tokens: Sequence[int]) -> None:
        if armed:
            explode(tokens)

    monkeypatch.setattr(model, "_explode", late)
    engine = fake_engine(model)
    engine.accept(answer("bad", INITIAL, None, (1, BOMB, 2), max_tokens=9))
    engine.accept(answer("good", INITIAL, None, (1, 2, 3), max_tokens=9))
    engine.accept(answer("other", INITIAL, None, ids(1), max_tokens=9))
    events = engine.step()
    armed = True
    events += drain(engine)
    failed = last(events, "bad")
    assert isinstance(failed, Failed) and failed.error == "EngineError" and "boom" in failed.message
    assert emitted(events, "good") == alone("g", INITIAL, None, (1, 2, 3), max_tokens=9)
    assert emitted(events, "other") == alone("g", INITIAL, None, ids(1), max_tokens=9)


@pytest.mark.parametrize("late", [True, False])
def test_a_commit_that_runs_out_of_memory_is_begun_again(late: bool) -> None:
    """Late: it says so when its result is asked for."""
    model = SlowModel()
    commit, failures = model.commit_beside, [torch.OutOfMemoryError("now"), torch.OutOfMemoryError("again")]

    def hungry(states: Sequence[SessionState], tokens: Tensor) -> Slow:
        if not failures:
            return commit(states, tokens)
        if not late:
            raise failures.pop()
        made = Slow(len(states), None, failures.pop())
        made.told = True
        return made

    model.commit_beside = hungry  # type: ignore[method-assign]
    lengths = (3, 3, 1, 2)
    engine = fake_engine(model)
    requests = [answer(f"g{i}", INITIAL, f"h{i}", ids(n, i), max_tokens=30) for i, n in enumerate(lengths)]
    events = drain(engine, *requests)
    assert not failures
    check_all(engine, events, *lengths)


def test_what_a_commit_lacked_memory_for_costs_no_other_session() -> None:
    """It runs out of memory in a step that its session isn't in."""
    model = SlowModel()
    runner = Runner(model)
    initial = model.initial_state()
    full = Decoding(dataclasses.replace(initial, pending=ids(CHUNK), kinds=bytes(CHUNK)), next=7)
    other = Decoding(dataclasses.replace(initial, pending=ids(1, 1), kinds=bytes(1)), next=7)
    missed, answered = runner.decode([full, other])
    assert missed is None and answered is not None
    model.commits[0]._error, model.commits[0].told = torch.OutOfMemoryError("now"), True
    other.next = 7
    (answered,) = runner.decode([other])
    assert not (answered is None or isinstance(answered, Exception)) and not runner.committing
    (answered,) = runner.decode([full])
    assert not (answered is None or isinstance(answered, Exception)) and len(model.commits) == 2
    assert full.state.position == CHUNK
    full.state, full.next = dataclasses.replace(full.state, pending=ids(CHUNK), kinds=bytes(CHUNK)), 7
    runner.decode([full, other])
    model.commits[2]._error = torch.OutOfMemoryError("again")
    assert runner.decode([]) == [] and not runner.committing, "nobody waits for it"


def roomy(device: Device, model: FakeModel) -> Engine:
    """States that don't fit go to the host."""
    budgets = Budgets(device=14 * NBYTES, host=40 * NBYTES)
    return Engine(model, INFO, Limits(max_decode_batch=12), dump, load, budgets, DeviceCopier(device))


def test_a_new_state_on_its_way_has_its_place_on_the_device() -> None:
    device = Device()
    model = SlowDeviceModel(device)
    engine = roomy(device, model)
    for i, length in enumerate((4, 1)):
        engine.accept(answer(f"g{i}", INITIAL, None, ids(length, i), max_tokens=9))
    while not model.commits:
        engine.step()
    running = engine._desk.running()
    assert [run.making for run in running] == [True, False]
    later = [run._replace(making=False) for run in running]
    assert engine._holdings.free(running) == engine._holdings.free(later) - 1
    assert engine._holdings.fits(13, later), "both stand on the first state yet"
    assert not engine._holdings.fits(13, running)


def test_new_states_on_their_way_do_not_pass_what_there_is_room_for() -> None:
    device = Device(states=20)
    model = SlowDeviceModel(device)
    engine = roomy(device, model)
    for i in range(12):
        drain(engine, read(f"r{i}", INITIAL, str(i), ids(20 - i % 3, i)))
    events: list[Event] = []
    for i in range(12):
        engine.accept(answer(f"g{i}", str(i), None, ids(2), max_tokens=14))
    rng = random.Random(1)
    while not engine.idle:
        events += engine.step()
        if model.commits and rng.random() < 0.3:
            model.commits[-1].told = True
    for i in range(12):
        end = last(events, f"g{i}")
        want = alone("g", INITIAL, None, ids(20 - i % 3, i) + ids(2), max_tokens=14)
        assert isinstance(end, Finished) and end.tokens == want
    assert device.most <= 20 and len(model.commits) > 4
    assert not engine._counters.values["out_of_memory_total"]


@pytest.mark.parametrize("seed", range(6))
def test_whenever_commits_end_the_tokens_are_the_same(seed: int) -> None:
    rng = random.Random(seed)
    model = SlowModel()
    model.beside = rng.choice([1, 2, 8])
    engine = fake_engine(model, max_decode_batch=rng.choice([3, 64]))
    lengths = [rng.randrange(1, 9) for _ in range(9)]
    waiting = [answer(f"g{i}", INITIAL, f"h{i}", ids(n, i), max_tokens=30) for i, n in enumerate(lengths)]
    events: list[Event] = []
    while waiting or not engine.idle:
        if waiting and rng.random() < 0.2:
            events += engine.accept(waiting.pop(0))
        events += engine.step()
        if model.commits and rng.random() < 0.3:
            model.commits[-1].told = True
    assert any(c.waited for c in model.commits) and any(not c.waited for c in model.commits)
    check_all(engine, events, *lengths)
