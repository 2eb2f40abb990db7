"""The engine over a model without mathematics: lifecycles, isolation, order, limits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from mnemosyne.engine.advance import advance
from mnemosyne.engine.counters import NAMES
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.messages import (
    INITIAL,
    Advance,
    Advanced,
    Cancel,
    Event,
    Export,
    Exported,
    Failed,
    Finished,
    Generate,
    Load,
    Loaded,
    Progress,
    Release,
    Sampling,
    Stats,
    StatsReport,
    Token,
    TokenTrace,
    TraceTokens,
)
from mnemosyne.engine.state import GENERATED, SessionState
from tests.engine.fakes import BLANK, BLIND, BOMB, CHUNK, INFO, POISON, FakeModel, dump, fake_engine


def ids(count: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(40) for _ in range(count))


def read(request_id: str, base: str, result: str, tokens: Sequence[int], tenant: str = "t") -> Advance:
    return Advance(request_id=request_id, tenant=tenant, base=base, result=result, tokens=tuple(tokens))


def answer(
    request_id: str, base: str, result: str | None, prompt: Sequence[int] = (), **sampling: object
) -> Generate:
    settings = Sampling(**sampling)  # type: ignore[arg-type]
    return Generate(
        request_id=request_id, tenant="t", base=base, result=result, prompt=tuple(prompt), sampling=settings
    )


def drain(engine: Engine, *requests: object) -> list[Event]:
    events = [event for request in requests for event in engine.accept(request)]  # type: ignore[arg-type]
    for _ in range(10_000):
        if engine.idle:
            return events
        events += engine.step()
    raise AssertionError("the engine doesn't come to an end")


def of(events: Sequence[Event], request_id: str) -> list[Event]:
    return [event for event in events if event.request_id == request_id]


def last(events: Sequence[Event], request_id: str) -> Event:
    return of(events, request_id)[-1]


def exported(engine: Engine, handle: str) -> bytes:
    event = last(drain(engine, Export(request_id=f"export {handle}", handle=handle)), f"export {handle}")
    assert isinstance(event, Exported), event
    return event.data


def expected(tokens: Sequence[int], kinds: bytes | None = None) -> bytes:
    model = FakeModel()
    return dump(advance(model, model.initial_state(), tokens, kinds, chunk=CHUNK))


def test_a_document_is_read_with_progress() -> None:
    engine = fake_engine()
    tokens = ids(103)
    events = drain(engine, read("r", INITIAL, "a", tokens))
    progress, end = events[:-1], events[-1]
    assert end == Advanced(request_id="r", position=100, tokens_seen=103)
    assert all(isinstance(event, Progress) for event in progress)
    assert [event.tokens_done for event in progress] == sorted({event.tokens_done for event in progress})
    assert [c.position for event in progress for c in event.trace] == list(range(CHUNK, 101, CHUNK))
    assert exported(engine, "a") == expected(tokens)


def test_any_split_ends_in_the_same_state() -> None:
    tokens = ids(61)
    engine = fake_engine()
    rng = random.Random(4)
    for trial in range(20):
        cuts = sorted(rng.randrange(len(tokens) + 1) for _ in range(rng.randrange(8)))
        base = INITIAL
        for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(tokens)], strict=True)):
            engine.accept(read(f"{trial}.{i}", base, f"{trial}.{i}", tokens[start:end]))
            base = f"{trial}.{i}"
        assert exported(engine, base) == expected(tokens)


def test_an_answer_is_streamed_and_kept() -> None:
    engine = fake_engine()
    prompt = ids(10)
    events = drain(engine, answer("g", INITIAL, "after", prompt, max_tokens=11, logprobs=2))
    end = events[-1]
    assert isinstance(end, Finished) and end.reason == "length" and end.tokens_seen == 21
    tokens = [event for event in events if isinstance(event, Token)]
    assert tuple(event.token for event in tokens) == end.tokens and len(tokens) == 11
    assert [event.index for event in tokens] == list(range(11))
    assert all(event.logprob is not None and len(event.top_logprobs) == 2 for event in tokens)
    chunks = [c.position for event in events if isinstance(event, Progress) for c in event.trace]
    assert chunks == [4, 8, 12, 16, 20]
    kinds = bytes(10) + bytes([GENERATED]) * 11
    assert exported(engine, "after") == expected(prompt + end.tokens, kinds)


def test_tokens_are_traced_in_pieces_beside_others() -> None:
    engine = fake_engine(max_super_chunk=3)
    tokens = ids(CHUNK * 40, seed=1)
    engine.accept(read("r", INITIAL, "a", ids(CHUNK * 40)))
    engine.accept(TraceTokens(request_id="t", tenant="t", base=INITIAL, tokens=tokens))
    events = drain(engine, read("s", "a", "b", ids(CHUNK * 3)))
    [end] = of(events, "t")
    assert isinstance(end, TokenTrace), "no progress is told of it"
    values = np.frombuffer(end.data, "<f4").reshape(-1, end.layers, 2)
    assert values[:, 0, 0].tolist() == list(tokens)
    assert exported(engine, "b") == expected(ids(CHUNK * 40) + ids(CHUNK * 3))


def test_a_trace_that_cannot_be_computed_fails_alone() -> None:
    engine = fake_engine()
    bad = (POISON,) * CHUNK
    events = drain(
        engine,
        TraceTokens(request_id="t", tenant="t", base=INITIAL, tokens=bad),
        TraceTokens(request_id="u", tenant="t", base=INITIAL, tokens=ids(CHUNK)),
    )
    failed = last(events, "t")
    assert isinstance(failed, Failed) and failed.error == "NotFinite"
    assert isinstance(last(events, "u"), TokenTrace)


@pytest.mark.parametrize("prompt_length", range(1, 6))
@pytest.mark.parametrize("max_tokens", range(7))
def test_answers_that_end_anywhere_in_a_chunk(prompt_length: int, max_tokens: int) -> None:
    engine = fake_engine()
    prompt = ids(prompt_length)
    end = drain(engine, answer("g", INITIAL, "after", prompt, max_tokens=max_tokens))[-1]
    assert isinstance(end, Finished)
    kinds = bytes(prompt_length) + bytes([GENERATED]) * max_tokens
    assert exported(engine, "after") == expected(prompt + end.tokens, kinds)
    dropped = drain(engine, answer("d", INITIAL, None, prompt, max_tokens=max_tokens))[-1]
    assert isinstance(dropped, Finished)
    assert (dropped.tokens, dropped.tokens_seen) == (end.tokens, end.tokens_seen)


def test_an_interrupted_answer_resumes_as_the_uninterrupted_one() -> None:
    engine = fake_engine()
    whole = drain(engine, answer("g", INITIAL, "w", ids(6), max_tokens=13, seed=9))[-1]
    assert isinstance(whole, Finished)
    first = drain(engine, answer("a", INITIAL, "half", ids(6), max_tokens=5, seed=9))[-1]
    second = drain(engine, answer("b", "half", "rest", (), max_tokens=8, seed=9))[-1]
    assert isinstance(first, Finished) and isinstance(second, Finished)
    assert first.tokens + second.tokens == whole.tokens
    assert exported(engine, "rest") == exported(engine, "w")


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it() -> None:
    engine = fake_engine()
    free = drain(engine, answer("g", INITIAL, None, ids(3), max_tokens=12, seed=2))[-1]
    assert isinstance(free, Finished)
    stop = free.tokens[7]
    at = free.tokens.index(stop)
    events = drain(engine, answer("s", INITIAL, "s", ids(3), max_tokens=12, seed=2, stop_ids=(stop,)))
    end = events[-1]
    assert end == Finished(request_id="s", reason="stop", tokens=free.tokens[:at], tokens_seen=3 + at)
    assert sum(isinstance(event, Token) for event in events) == at
    ignored = answer("i", INITIAL, None, ids(3), max_tokens=12, seed=2, stop_ids=(stop,), ignore_eos=True)
    again = drain(engine, ignored)[-1]
    assert isinstance(again, Finished) and again.tokens == free.tokens


def test_alone_and_together_are_the_same() -> None:
    def requests(i: int) -> Generate:
        return answer(f"g{i}", INITIAL, f"h{i}", ids(3 + 5 * i, i), max_tokens=4 + i, seed=i)

    alone = []
    for i in range(9):
        engine = fake_engine()
        drain(engine, requests(i))
        alone.append(exported(engine, f"h{i}"))
    model = FakeModel()
    engine = fake_engine(model)
    drain(engine, *(requests(i) for i in range(9)))
    assert [exported(engine, f"h{i}") for i in range(9)] == alone
    assert max(model.decodes) > 4 and max(sessions for sessions, _ in model.prefills) > 2


def test_decode_goes_on_beside_ingest() -> None:
    engine = fake_engine()
    drain(engine, read("b", INITIAL, "b", ids(5)))
    engine.accept(read("r", INITIAL, "a", ids(4000)))
    engine.accept(answer("g", "b", None, (), max_tokens=20))
    for _ in range(20):
        events = engine.step()
        assert any(isinstance(event, Token) for event in events)
        assert any(isinstance(event, Progress) for event in events)


def test_requests_may_build_on_results_that_are_not_there_yet() -> None:
    engine = fake_engine()
    tokens = ids(50)
    engine.accept(read("1", INITIAL, "a", tokens[:20]))
    engine.accept(read("2", "a", "b", tokens[20:33]))
    engine.accept(answer("3", "b", "c", tokens[33:], max_tokens=3))
    engine.accept(Export(request_id="4", handle="c"))
    for handle in "abc":
        engine.accept(Release(handle=handle))
    events = drain(engine)
    end = last(events, "3")
    assert isinstance(end, Finished)
    data = last(events, "4")
    assert isinstance(data, Exported)
    assert data.data == expected(tokens + end.tokens, bytes(50) + bytes([GENERATED]) * 3)
    gone = last(drain(engine, Export(request_id="5", handle="c")), "5")
    assert isinstance(gone, Failed) and gone.error == "UnknownHandle"


def test_a_failure_takes_its_dependents_along_and_nobody_else() -> None:
    engine = fake_engine()
    drain(engine, read("0", INITIAL, "base", ids(9)))
    poisoned = (*ids(30)[:7], POISON, *ids(30))
    events = drain(
        engine,
        read("bad", "base", "x", poisoned),
        read("after", "x", "y", ids(3)),
        answer("later", "y", None, ids(2)),
        Export(request_id="export", handle="y"),
        read("good", "base", "z", ids(30, 5)),
    )
    for request_id in ("bad", "after", "later", "export"):
        end = last(events, request_id)
        assert isinstance(end, Failed) and end.error == "NotFinite", end
    assert isinstance(last(events, "good"), Advanced)
    assert exported(engine, "z") == expected(ids(9) + ids(30, 5))
    assert exported(engine, "base") == expected(ids(9))
    again = drain(engine, read("again", "base", "x", ids(3)))[-1]
    assert isinstance(again, Advanced), "a handle whose request failed is free"


def test_a_logit_that_is_not_finite_fails_that_answer_alone() -> None:
    engine = fake_engine()
    events = drain(
        engine,
        answer("bad", INITIAL, "x", (1, BLIND), max_tokens=9),
        answer("good", INITIAL, "y", (1, 2), max_tokens=9),
    )
    bad, good = last(events, "bad"), last(events, "good")
    assert isinstance(bad, Failed) and bad.error == "NotFinite"
    alone = drain(fake_engine(), answer("good", INITIAL, None, (1, 2), max_tokens=9))[-1]
    assert isinstance(good, Finished) and isinstance(alone, Finished) and good.tokens == alone.tokens


@pytest.mark.parametrize("max_tokens", [3, 9], ids=["as the answer ends", "amid the answer"])
def test_a_chunk_that_an_answer_completes_may_break_the_memory(max_tokens: int) -> None:
    engine = fake_engine()
    events = drain(
        engine,
        answer("bad", INITIAL, "x", (1, POISON), max_tokens=max_tokens),
        answer("good", INITIAL, "y", (1, 2), max_tokens=max_tokens),
    )
    end = last(events, "bad")
    assert isinstance(end, Failed) and end.error == "NotFinite"
    assert sum(isinstance(event, Token) for event in of(events, "bad")) == 3
    assert isinstance(last(events, "good"), Finished)
    gone = last(drain(engine, Export(request_id="e", handle="x")), "e")
    assert isinstance(gone, Failed) and gone.error == "UnknownHandle"


def test_an_exception_in_a_batch_fails_the_row_at_fault_alone() -> None:
    engine = fake_engine()
    events = drain(
        engine,
        read("warm", INITIAL, "warm", ids(40)),
        read("bad", INITIAL, "x", (*ids(5), BOMB, *ids(5))),
        read("good", INITIAL, "y", ids(30)),
        answer("bad answer", INITIAL, None, (BOMB,), max_tokens=9),
        answer("good answer", INITIAL, "z", (1, 2), max_tokens=9),
    )
    for request_id in ("bad", "bad answer"):
        end = last(events, request_id)
        assert isinstance(end, Failed) and end.error == "EngineError" and "boom" in end.message
    assert exported(engine, "y") == expected(ids(30))
    end = last(events, "good answer")
    assert isinstance(end, Finished)
    assert exported(engine, "z") == expected((1, 2) + end.tokens, bytes(2) + bytes([GENERATED]) * 9)


def test_a_decode_that_raises_once_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = drain(fake_engine(), answer("g", INITIAL, None, ids(2), max_tokens=20))[-1]
    model = FakeModel()
    decode, calls = model.decode, []

    def flaky(*args: object) -> object:
        calls.append(1)
        if len(calls) % 3 == 2:
            raise RuntimeError("out of memory")
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "decode", flaky)
    end = drain(fake_engine(model), answer("g", INITIAL, None, ids(2), max_tokens=20))[-1]
    assert isinstance(end, Finished) and isinstance(calm, Finished) and end.tokens == calm.tokens
    assert len(calls) > 6


def test_cancel_takes_effect_at_the_next_step() -> None:
    engine = fake_engine()
    engine.accept(read("r", INITIAL, "a", ids(4000)))
    engine.accept(read("dependent", "a", "b", ids(3)))
    engine.accept(answer("g", INITIAL, "c", ids(3), max_tokens=1000))
    engine.accept(answer("other", INITIAL, None, ids(3), max_tokens=5))
    engine.step()
    events = engine.accept(Cancel(request_id="r")) + engine.accept(Cancel(request_id="g"))
    assert {event.request_id for event in events} == {"r", "dependent", "g"}
    assert all(isinstance(event, Failed) and event.error == "Cancelled" for event in events)
    rest = drain(engine, Cancel(request_id="r"), Cancel(request_id="never was"))
    assert {event.request_id for event in rest} == {"other"}
    gone = last(drain(engine, Export(request_id="e", handle="a")), "e")
    assert isinstance(gone, Failed) and gone.error == "UnknownHandle"


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (read("x", "nowhere", "r", ()), "UnknownHandle", None),
        (Export(request_id="x", handle="nowhere"), "UnknownHandle", None),
        (read("x", INITIAL, INITIAL, ()), "EngineError", None),
        (Load(request_id="x", handle=INITIAL, data=b""), "EngineError", None),
        (read("x", INITIAL, "r", (50,)), "RequestError", "tokens"),
        (read("x", INITIAL, "r", (-1,)), "RequestError", "tokens"),
        (read("x", INITIAL, "r", (2**63,)), "RequestError", "tokens"),
        (read("x", INITIAL, "r", (1,) * 5000), "ContextTooLong", None),
        (answer("x", INITIAL, "r", (50,)), "RequestError", "prompt"),
        (answer("x", INITIAL, "r", ()), "RequestError", "prompt"),
        (answer("x", INITIAL, "r", (1,), top_p=2.0), "RequestError", "top_p"),
        (
            Advance(request_id="x", tenant="", base=INITIAL, result="r", tokens=(1, 2), kinds=b"\0"),
            "RequestError",
            "kinds",
        ),
        (
            Advance(request_id="x", tenant="", base=INITIAL, result="r", tokens=(1,), kinds=b"\2"),
            "RequestError",
            "kinds",
        ),
        (Load(request_id="x", handle="r", data=b"nonsense"), "SnapshotCorrupt", None),
    ],
)
def test_bad_requests_are_refused_by_name(request_: object, error: str, param: str | None) -> None:
    engine = fake_engine(max_queued_tokens=4999)
    end = last(drain(engine, request_), "x")
    assert isinstance(end, Failed) and (end.error, end.attributes.get("param")) == (error, param)
    assert isinstance(drain(engine, read("y", INITIAL, "r", ids(9)))[-1], Advanced)


def test_a_bound_handle_and_a_running_id_are_not_taken_twice() -> None:
    engine = fake_engine()
    events = engine.accept(read("r", INITIAL, "a", ids(400)))
    events += engine.accept(read("s", INITIAL, "a", ids(4)))
    assert isinstance(events[-1], Failed) and "bound already" in events[-1].message
    assert isinstance(engine.accept(read("r", INITIAL, "b", ids(4)))[-1], Failed)


def test_the_queue_has_a_limit_and_frees_up() -> None:
    engine = fake_engine(max_requests=3, max_queued_tokens=300)
    engine.accept(read("1", INITIAL, "a", ids(200)))
    full = engine.accept(read("2", INITIAL, "b", ids(101)))
    assert isinstance(full[-1], Failed) and full[-1].error == "QueueFull"
    assert engine.accept(answer("3", INITIAL, None, ids(100), max_tokens=2)) == []
    engine.accept(read("4", "a", "d", ()))
    full = engine.accept(answer("5", INITIAL, None, ids(1)))
    assert isinstance(full[-1], Failed) and full[-1].error == "QueueFull"
    drain(engine)
    assert isinstance(drain(engine, read("6", "d", "e", ids(300)))[-1], Advanced)


def test_states_go_out_and_come_back() -> None:
    engine = fake_engine()
    drain(engine, read("r", INITIAL, "a", ids(30)))
    data = exported(engine, "a")
    loaded = drain(
        fresh := fake_engine(), Load(request_id="l", handle="b", data=data), read("r", "b", "c", ids(9))
    )
    assert last(loaded, "l") == Loaded(request_id="l", position=28, tokens_seen=30)
    assert exported(fresh, "c") == expected(ids(30) + ids(9))


def test_a_long_chain_of_small_requests() -> None:
    engine = fake_engine(max_requests=1000)
    engine.accept(read("first", INITIAL, "0", ids(40)))
    for i in range(900):
        engine.accept(read(str(i), str(i), str(i + 1), (i % 40,)))
    assert isinstance(last(drain(engine), "899"), Advanced)
    assert exported(engine, "900") == expected(ids(40) + tuple(i % 40 for i in range(900)))


def test_nothing_is_held_that_was_released() -> None:
    engine = fake_engine()
    drain(engine, read("r", INITIAL, "a", ids(30)), answer("g", "a", "b", ids(2)), Release(handle=INITIAL))
    assert stats(engine)["handles"] == 3
    drain(engine, Release(handle="a"), Release(handle="b"), Release(handle="b"))
    assert stats(engine)["handles"] == 1
    assert isinstance(drain(engine, read("s", INITIAL, "a", ()))[-1], Advanced)
    held = stats(engine)["state_bytes"]
    assert held == INFO.state_bytes, "the copy of a state that nothing was read on is the state"


def stats(engine: Engine) -> dict[str, float]:
    report = engine.accept(Stats(request_id="stats"))[-1]
    assert isinstance(report, StatsReport)
    return report.values


def test_what_is_counted() -> None:
    engine = fake_engine(max_queued_tokens=400)
    assert list(stats(engine)) == list(NAMES)
    begun = {"handles", "state_bytes", "device_states", "device_state_bytes"}
    assert not any(value for name, value in stats(engine).items() if name not in begun)
    engine.accept(read("r", INITIAL, "a", ids(201)))
    engine.accept(read("w", "a", "c", ids(2)))
    engine.accept(read("full", INITIAL, "b", ids(300)))
    now = stats(engine)
    assert (now["requests_ingesting"], now["requests_waiting"], now["queued_tokens"]) == (1, 1, 203)
    drain(engine, answer("g", INITIAL, None, ids(3), max_tokens=9))
    engine.accept(answer("c", INITIAL, None, ids(3), max_tokens=9))
    engine.step()
    assert stats(engine)["requests_decoding"] == 1
    drain(engine, Cancel(request_id="c"))
    now = stats(engine)
    assert now["tokens_ingested_total"] == 200 and now["tokens_generated_total"] == 10
    assert now["tokens_recommitted_total"] == 8
    assert now["chunks_written_total"] == 50 + 2 and now["chunks_skipped_total"] == 0
    assert (
        now["requests_finished_total"],
        now["requests_cancelled_total"],
        now["requests_rejected_total"],
    ) == (3, 1, 1)
    assert now["requests_running"] == now["requests_waiting"] == now["queued_tokens"] == 0
    assert now["busy_seconds_total"] >= now["ingest_seconds_total"] + now["decode_seconds_total"] > 0


def test_chunks_that_wrote_nothing_are_counted_apart() -> None:
    engine = fake_engine()
    kept, blank = ids(CHUNK), (BLANK, *ids(CHUNK - 1))
    drain(engine, read("r", INITIAL, "a", (*kept, *blank, *kept, 1)))
    now = stats(engine)
    assert (now["chunks_written_total"], now["chunks_skipped_total"]) == (2, 1)


def test_a_loaded_state_with_a_full_pending_chunk_goes_on() -> None:
    model = FakeModel()
    state = SessionState(0, model.initial_state().tensors, ids(CHUNK), bytes(CHUNK))
    engine = fake_engine()
    events = drain(
        engine,
        Load(request_id="l", handle="a", data=dump(state)),
        answer("g", "a", "b", (), max_tokens=1),
    )
    end = last(events, "g")
    assert isinstance(end, Finished)
    assert exported(engine, "b") == expected(ids(CHUNK) + end.tokens, bytes(CHUNK) + bytes([GENERATED]))
