"""A device that runs out of memory in the middle of a step: idle states go, then steps get smaller, and only
what doesn't fit alone fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from mnemosyne.engine.cap import PATIENCE, Cap
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.messages import (
    INITIAL,
    Advanced,
    Event,
    Export,
    Failed,
    Finished,
    Load,
    Loaded,
    Progress,
    Release,
    TraceTokens,
)
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.state import SessionState
from tests.engine.fakes import CHUNK, INFO, FakeModel, dump, fake_engine, load
from tests.engine.small_device import Device, DeviceModel, device_engine
from tests.engine.test_engine import answer, drain, expected, exported, ids, last, read, stats

torch.set_num_threads(1)


def alone(i: int, prompt: Sequence[int], **sampling: object) -> tuple[int, ...]:
    end = drain(fake_engine(), answer(f"g{i}", INITIAL, None, prompt, **sampling))[-1]
    assert isinstance(end, Finished)
    return end.tokens


def test_idle_states_move_out_and_the_step_is_run_again() -> None:
    device = Device()
    engine = device_engine(device, on_device=100, on_host=100)  # more than there is
    for i in range(8):
        drain(engine, read(f"r{i}", INITIAL, str(i), ids(20, i)))
    device.states = 9
    events = drain(engine, read("x", "7", "x", ids(9)), answer("g", "3", "y", ids(2), max_tokens=9))
    assert isinstance(last(events, "x"), Advanced)
    end = last(events, "g")
    assert isinstance(end, Finished) and end.tokens == alone(0, ids(20, 3) + ids(2), max_tokens=9)
    now = stats(engine)
    assert now["out_of_memory_total"] >= 1 and now["states_moved_out_total"] >= 5
    assert exported(engine, "x") == expected(ids(20, 7) + ids(9))
    for i in range(8):
        assert exported(engine, str(i)) == expected(ids(20, i))


def test_a_step_that_is_too_large_gets_smaller_and_nothing_is_lost() -> None:
    device = Device()
    engine = device_engine(device, on_device=100, on_host=100, max_ingest_tokens=CHUNK * 64)
    device.chunks = 5
    events = drain(engine, *(read(f"r{i}", INITIAL, str(i), ids(90 + i, i)) for i in range(7)))
    for i in range(7):
        end = last(events, f"r{i}")
        assert isinstance(end, Advanced) and end.tokens_seen == 90 + i
        assert exported(engine, str(i)) == expected(ids(90 + i, i))
    steps = [c.position for e in events if isinstance(e, Progress) and e.request_id == "r3" for c in e.trace]
    assert steps == list(range(CHUNK, 93, CHUNK)), "every chunk once"
    assert 1 <= stats(engine)["out_of_memory_total"] < 8, "it remembers what was too large"
    assert stats(engine)["tokens_ingested_total"] == sum((90 + i - 1) // CHUNK * CHUNK for i in range(7))


def test_what_answers_have_unfinished_does_not_keep_others_from_reading() -> None:
    device = Device()
    engine = device_engine(device, on_device=100, on_host=100, max_ingest_tokens=CHUNK)
    model: DeviceModel = engine._runner._model  # type: ignore[assignment]
    prefill = model.prefill

    def beside(states: Sequence[SessionState], tokens: torch.Tensor, *rest: bool) -> object:
        if states[0].position >= CHUNK and device.opened_now:
            raise torch.OutOfMemoryError("no room beside an unfinished chunk")
        return prefill(states, tokens, *rest)

    model.prefill = beside  # type: ignore[method-assign, assignment]
    engine.accept(answer("g", INITIAL, None, ids(1), max_tokens=3))
    engine.step()
    events = drain(engine, read("r", INITIAL, "r", ids(CHUNK * 2 + 1)))
    ended = [event.request_id for event in events if isinstance(event, Advanced | Finished)]
    assert ended == ["r", "g"], "the reader doesn't wait for the answer's end"
    assert exported(engine, "r") == expected(ids(CHUNK * 2 + 1))
    assert stats(engine)["out_of_memory_total"] == 1


def test_answers_take_turns_where_not_all_of_them_fit() -> None:
    device = Device()
    engine = device_engine(device, on_device=100, on_host=100)
    device.open = 3
    events = drain(
        engine, *(answer(f"g{i}", INITIAL, f"h{i}", ids(3 + i, i), max_tokens=11) for i in range(8))
    )
    for i in range(8):
        end = last(events, f"g{i}")
        assert isinstance(end, Finished), end
        assert end.tokens == alone(i, ids(3 + i, i), max_tokens=11)
        assert exported(engine, f"h{i}") == expected(
            ids(3 + i, i) + end.tokens, bytes(3 + i) + bytes([1]) * 11
        )


def test_the_chunks_that_an_answer_commits_are_told_once_though_the_step_ran_twice() -> None:
    device = Device()
    engine = device_engine(device, on_device=100, on_host=100)
    model: DeviceModel = engine._runner._model  # type: ignore[assignment]
    begin, decode, calls = model.begin, model.decode, []

    def flaky(run: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object) -> object:
            calls.append(1)
            if len(calls) % 4 == 2 and model.prefills:
                raise torch.OutOfMemoryError("now and then")
            return run(*args)

        return wrapped

    model.begin = flaky(begin)  # type: ignore[method-assign, assignment]
    model.decode = flaky(decode)  # type: ignore[method-assign, assignment]
    engine.accept(answer("other", INITIAL, None, ids(3), max_tokens=30))
    events = drain(engine, answer("g", INITIAL, "h", ids(3), max_tokens=30))
    end = last(events, "g")
    assert len(calls) > 6 and isinstance(end, Finished) and end.tokens == alone(0, ids(3), max_tokens=30)
    told = [c.position for e in events if isinstance(e, Progress) and e.request_id == "g" for c in e.trace]
    assert told == list(range(CHUNK, 33, CHUNK))


@pytest.mark.parametrize("kind", ["read", "answer", "trace", "load", "export"])
def test_what_does_not_fit_alone_fails_and_nobody_else_is_hurt(kind: str) -> None:
    device = Device()
    model = DeviceModel(device)
    big = ids(CHUNK * 3, seed=77)

    def hungry(run: Callable[..., object], is_big: Callable[..., bool]) -> Callable[..., object]:
        def wrapped(*args: object, **named: object) -> object:
            if is_big(*args):
                raise torch.OutOfMemoryError("not for this one")
            return run(*args, **named)

        return wrapped

    def reads_big(states: object, tokens: torch.Tensor, *rest: object) -> bool:
        return any(big[:CHUNK] == tuple(row[:CHUNK]) for row in tokens.tolist())

    def opens_big(states: Sequence[object], *rest: object) -> bool:
        return any(big[:3] == state.pending[:3] for state in states)

    model.prefill = hungry(model.prefill, reads_big)  # type: ignore[method-assign, assignment]
    model.open_chunk = hungry(model.open_chunk, opens_big)  # type: ignore[method-assign, assignment]
    engine = Engine(
        model,
        INFO,
        Limits(),
        hungry(dump, lambda state: kind == "export" and state.position == 8),  # type: ignore[arg-type]
        hungry(load, lambda data: kind == "load"),  # type: ignore[arg-type]
    )
    requests = {
        "read": read("big", INITIAL, "x", big),
        "answer": answer("big", INITIAL, "x", big[:4], max_tokens=5),
        "trace": TraceTokens(request_id="big", tenant="t", base=INITIAL, tokens=big),
        "load": Load(request_id="big", handle="x", data=dump(FakeModel().initial_state())),
        "export": Export(request_id="big", handle="base"),
    }
    drain(engine, read("base", INITIAL, "base", ids(9)))
    events: list[Event] = drain(
        engine,
        read("one", "base", "one", ids(30, 1)),
        requests[kind],
        answer("two", "base", "two", ids(6, 2), max_tokens=20),
        read("three", INITIAL, "three", ids(50, 3)),
    )
    end = last(events, "big")
    assert isinstance(end, Failed) and end.error == "DeviceFull", end
    assert "memory" in end.message and end.attributes["retry_after"]
    assert exported(engine, "one") == expected(ids(9) + ids(30, 1))
    assert exported(engine, "three") == expected(ids(50, 3))
    two = last(events, "two")
    assert isinstance(two, Finished) and two.tokens == alone(0, ids(9) + ids(6, 2), max_tokens=20)
    assert isinstance(drain(engine, read("again", "one", "x", ids(9)))[-1], Advanced)


def test_no_room_to_bring_a_state_back_fails_that_request_alone() -> None:
    device = Device()
    engine = device_engine(device, on_device=4, on_host=20)
    for i in range(6):
        drain(engine, read(f"r{i}", INITIAL, str(i), ids(20, i)))
    for i in range(1, 6):
        drain(engine, Release(handle=str(i)))
    device.states = device.live
    end = drain(engine, read("x", "0", "x", ids(9)))[-1]
    assert isinstance(end, Failed) and end.error == "DeviceFull"
    device.states += 2
    assert isinstance(drain(engine, read("y", "0", "x", ids(9)))[-1], Advanced)
    assert exported(engine, "x") == expected(ids(20, 0) + ids(9))


def test_a_last_token_that_commits_a_chunk_has_room_made_for_it() -> None:
    device = Device()
    engine = device_engine(device, on_device=100, on_host=100)
    for i in range(4):
        drain(engine, read(f"r{i}", INITIAL, str(i), ids(20, i)))
    device.states = device.live
    events = drain(engine, answer("g", "0", "x", (), max_tokens=1))  # 20 + 1: the chunk of 16 to 20 is full
    end = last(events, "g")
    assert isinstance(end, Finished) and stats(engine)["out_of_memory_total"] == 1
    assert exported(engine, "x") == expected(ids(20, 0) + end.tokens, bytes(20) + b"\1")


def test_loading_makes_room() -> None:
    device = Device()
    engine = device_engine(device, on_device=100, on_host=100)
    for i in range(4):
        drain(engine, read(f"r{i}", INITIAL, str(i), ids(20, i)))
    data, left = exported(engine, "0"), []

    def once(data: bytes):  # type: ignore[no-untyped-def]
        if not left:
            left.append(1)
            raise torch.OutOfMemoryError("once")
        return load(data)

    engine._transfers._load = once
    assert isinstance(drain(engine, Load(request_id="l", handle="l", data=data))[-1], Loaded)
    assert stats(engine)["states_moved_out_total"] == 4 and exported(engine, "l") == data


def test_a_cap_halves_and_comes_back_slowly() -> None:
    cap = Cap(100)
    cap.failed(100)
    assert cap.value == 50
    cap.failed(9)
    assert cap.value == 4
    cap.failed(60)
    assert cap.value == 4, "a failure never raises it"
    for _ in range(PATIENCE - 1):
        cap.succeeded()
    assert cap.value == 4
    cap.succeeded()
    assert cap.value == 8
    for _ in range(PATIENCE * 9):
        cap.succeeded()
    assert cap.value == 100
