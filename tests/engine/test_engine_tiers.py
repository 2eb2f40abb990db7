"""Sessions that don't all fit on the device: they move to the host and back, and nothing else changes."""

from __future__ import annotations

import random
import weakref
from functools import partial

import pytest
import torch

from mnemosyne.checkpoints.snapshot import dump_state, load_state
from mnemosyne.engine.copies import PlainCopier
from mnemosyne.engine.counters import Counters
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.gpu.blob import BlobLayout
from mnemosyne.engine.holdings import Holdings, Running
from mnemosyne.engine.messages import (
    INITIAL,
    Advanced,
    Cancel,
    Export,
    Exported,
    Failed,
    Finished,
    Load,
    Loaded,
    Progress,
    Release,
    Token,
)
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.tiers import Budgets, Tier
from tests.engine.fakes import INFO, POISON, fake_engine
from tests.engine.models import random_tokens, small_config, small_model
from tests.engine.small_device import NBYTES, Device, DeviceCopier, device_engine
from tests.engine.test_engine import answer, drain, expected, exported, ids, last, of, read, stats

torch.set_num_threads(1)


def with_sessions(engine: Engine, count: int) -> None:
    """Handles "0", "1", ... of 20 tokens each, one after the other."""
    for i in range(count):
        assert isinstance(drain(engine, read(f"r{i}", INITIAL, str(i), ids(20, i)))[-1], Advanced)


def settled(engine: Engine) -> dict[str, float]:
    """What is counted once every copy has ended: the fakes' end when they are asked."""
    for _ in range(4):
        engine.accept(Release(handle="nobody"))
    return stats(engine)


@pytest.mark.parametrize("polls", [0, 1, 3])
def test_more_sessions_than_the_device_holds(polls: int) -> None:
    device = Device(states=6)  # the budget, and what a step makes
    engine = device_engine(device, on_device=4, on_host=20, copier=DeviceCopier(device, polls))
    with_sessions(engine, 12)
    now = settled(engine)
    assert now["host_states"] >= 8 and now["device_states"] <= 4 and device.live <= 4
    assert now["host_states"] + now["device_states"] == now["handles"] == 13
    assert now["host_state_bytes"] == now["host_states"] * NBYTES
    assert now["state_bytes_moved_out_total"] == now["states_moved_out_total"] * NBYTES
    assert now["state_move_out_seconds_total"] == now["states_moved_out_total"] * 0.5
    for i in range(12):
        assert exported(engine, str(i)) == expected(ids(20, i)), "read from wherever it is"
    for i in range(12):
        assert isinstance(drain(engine, read(f"s{i}", str(i), f"s{i}", ids(7, 50 + i)))[-1], Advanced)
        drain(engine, Release(handle=str(i)))
        assert exported(engine, f"s{i}") == expected(ids(20, i) + ids(7, 50 + i))
    assert stats(engine)["states_moved_in_total"] > 6
    assert device.most <= 6 and not stats(engine)["out_of_memory_total"]


def test_random_lives_are_those_of_a_device_that_holds_all() -> None:
    for seed in range(6):
        rng = random.Random(seed)
        device = Device(states=9)
        tight = device_engine(device, on_device=5, on_host=30, copier=DeviceCopier(device, seed % 3))
        roomy = fake_engine()
        heads = [INITIAL] * 7
        for turn in range(60):
            who = rng.sample(range(7), rng.randrange(1, 5))
            requests = []
            for i in who:
                name, tokens = f"{turn}.{i}", ids(rng.randrange(1, 18), turn * 10 + i)
                if rng.random() < 0.5:
                    requests.append(read(name, heads[i], name, tokens))
                else:
                    requests.append(answer(name, heads[i], name, tokens, max_tokens=rng.randrange(1, 9)))
                if heads[i] != INITIAL:
                    requests.append(Release(handle=heads[i]))
                heads[i] = name
            ends = [
                {e.request_id: e for e in drain(engine, *requests) if isinstance(e, Advanced | Finished)}
                for engine in (tight, roomy)
            ]
            assert ends[0] == ends[1] and len(ends[0]) == len(who)
        for head in set(heads):
            assert exported(tight, head) == exported(roomy, head)
        assert stats(tight)["states_moved_in_total"] > 5
        assert not stats(tight)["out_of_memory_total"], "the budgets were kept"


def test_others_go_on_while_a_state_is_on_its_way() -> None:
    device = Device()
    engine = device_engine(device, on_device=4, on_host=20, copier=DeviceCopier(device, polls=10))
    with_sessions(engine, 6)
    settled(engine)
    engine.accept(answer("running", INITIAL, None, ids(3), max_tokens=40))
    engine.step()
    engine.accept(read("away", "0", "x", ids(9)))
    alone = 0
    while not of(events := engine.step(), "away"):
        alone += any(isinstance(e, Token) for e in of(events, "running"))
    assert alone > 2, "its copy was waited for while there was something to do"
    drain(engine)
    assert exported(engine, "x") == expected(ids(20, 0) + ids(9))


def test_a_lone_request_waits_for_its_copy_without_spinning() -> None:
    device = Device()
    engine = device_engine(device, on_device=4, on_host=20, copier=DeviceCopier(device, polls=1000))
    for i in range(8):
        engine.accept(read(f"r{i}", INITIAL, str(i), ids(20, i)))
    drain(engine)
    engine._holdings.wait()
    engine.accept(read("x", "0", "x", ids(9)))
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
    assert steps < 30
    assert exported(engine, "x") == expected(ids(20, 0) + ids(9))


def test_a_state_that_is_wanted_while_it_leaves_stays() -> None:
    device = Device()
    copier = DeviceCopier(device, polls=1_000_000)
    engine = device_engine(device, on_device=6, on_host=20, copier=copier)
    with_sessions(engine, 4)
    assert copier.outs and not stats(engine)["states_moved_out_total"]
    end = drain(engine, read("x", "0", "x", ids(9)))[-1]
    assert isinstance(end, Advanced)
    assert copier.backs == 0 and exported(engine, "0") == expected(ids(20, 0))


def test_cancelled_on_its_way_it_leaves_nothing() -> None:
    device = Device()
    engine = device_engine(device, on_device=4, on_host=20, copier=DeviceCopier(device, polls=5))
    with_sessions(engine, 6)
    settled(engine)
    engine.accept(read("x", "0", "x", ids(9)))
    [end] = engine.accept(Cancel(request_id="x"))
    assert isinstance(end, Failed) and end.error == "Cancelled"
    assert engine.idle
    assert isinstance(drain(engine, read("y", "0", "y", ids(9)))[-1], Advanced)
    assert exported(engine, "y") == expected(ids(20, 0) + ids(9))


def test_no_room_in_any_tier_is_refused_with_the_settings_names() -> None:
    device = Device()
    engine = device_engine(device, on_device=4, on_host=3)
    with_sessions(engine, 6)
    refused = drain(engine, read("x", INITIAL, "x", ids(9)))[-1]
    assert isinstance(refused, Failed) and refused.error == "StatesFull"
    assert "--device-state-bytes" in refused.message and "--host-state-bytes" in refused.message
    assert refused.attributes["retry_after"]
    refused = drain(engine, Load(request_id="l", handle="l", data=exported(engine, "0")))[-1]
    assert isinstance(refused, Failed) and refused.error == "StatesFull"
    assert stats(engine)["requests_rejected_total"] == 2
    told = drain(engine, answer("g", "3", None, ids(3), max_tokens=9))[-1]
    assert isinstance(told, Finished), "what keeps nothing needs no room for it"
    drain(engine, Release(handle="5"))
    assert isinstance(drain(engine, read("y", "0", "y", ids(9)))[-1], Advanced)
    assert exported(engine, "y") == expected(ids(20, 0) + ids(9))


def test_results_that_are_promised_need_room_too() -> None:
    device = Device()
    engine = device_engine(device, on_device=4, on_host=3)
    events = [e for i in range(9) for e in engine.accept(read(f"r{i}", INITIAL, str(i), ids(20, i)))]
    assert [e.request_id for e in events if isinstance(e, Failed)] == ["r6", "r7", "r8"]
    events += drain(engine)
    assert sum(isinstance(e, Advanced) for e in events) == 6


def test_one_request_runs_where_the_host_is_full_and_nothing_can_leave() -> None:
    device = Device()
    engine = device_engine(device, on_device=3, on_host=1)
    with_sessions(engine, 3)
    told = drain(engine, answer("g", "0", None, ids(9), max_tokens=9))[-1]
    assert isinstance(told, Finished)
    alone = drain(fake_engine(), answer("g", INITIAL, None, ids(20, 0) + ids(9), max_tokens=9))[-1]
    assert isinstance(alone, Finished) and alone.tokens == told.tokens


def test_memory_that_cannot_be_pinned_is_said_and_goes_without() -> None:
    device = Device()
    copier = DeviceCopier(device)
    copier.pinned = 2
    engine = device_engine(device, on_device=3, on_host=20, copier=copier)
    with_sessions(engine, 4)
    events = [e for i in range(4, 9) for e in drain(engine, read(f"r{i}", INITIAL, str(i), ids(20, i)))]
    assert any(isinstance(e, Failed) and e.error == "StatesFull" for e in events)
    assert settled(engine)["host_states"] <= 2
    for i in range(4):
        assert exported(engine, str(i)) == expected(ids(20, i))


def test_a_full_batch_of_answers_commits_in_parts() -> None:
    """All chunks are full in the same step, and there is room for few new states."""
    device = Device(states=20)
    engine = device_engine(device, on_device=14, on_host=40, max_decode_batch=12)
    with_sessions(engine, 12)
    events = drain(engine, *(answer(f"g{i}", str(i), None, ids(2), max_tokens=14) for i in range(12)))
    alone = fake_engine()
    for i in range(12):
        want = last(drain(alone, answer(f"g{i}", INITIAL, None, ids(20, i) + ids(2), max_tokens=14)), f"g{i}")
        got = last(events, f"g{i}")
        assert isinstance(got, Finished) and isinstance(want, Finished) and got.tokens == want.tokens
    assert device.most <= 20 and not stats(engine)["out_of_memory_total"]


def test_a_step_makes_no_more_states_than_there_is_room_for() -> None:
    device = Device()
    engine = device_engine(device, on_device=6, on_host=40)
    drain(engine, *(read(f"r{i}", INITIAL, str(i), ids(80, i)) for i in range(4)))
    assert device.most <= 6, "four under way, the first one, and a new one"
    for i in range(4):
        assert exported(engine, str(i)) == expected(ids(80, i))


def test_what_is_used_or_kept_does_not_leave() -> None:
    counters, copier = Counters(), DeviceCopier(Device(), polls=1)
    holdings = Holdings(NBYTES, counters, Budgets(device=6 * NBYTES, host=9 * NBYTES), copier)
    held = [holdings.hold({"memory.0": torch.zeros(8)}, fixed=i == 0) for i in range(6)]
    holdings.use(held[3])
    running = [Running(held[1].tensors, 0), Running({"memory.0": torch.zeros(8)}, 0), Running(None, NBYTES)]
    holdings.make_room(9, running, keep=held[2])
    tiers = [one.tier for one in held]
    assert tiers == [Tier.DEVICE] * 3 + [Tier.LEAVING] * 3
    assert holdings.free(running) == -1, "seven are there until the copies have ended"
    holdings.wait()
    holdings.poll()
    assert [one.tier for one in held] == [Tier.DEVICE] * 3 + [Tier.HOST] * 3
    assert holdings.free(running) == 2 and holdings.fits(1, running) and not holdings.fits(2, running)
    holdings.fetch(held[4])
    assert held[4].tier is Tier.ARRIVING and holdings.free(running) == 1
    del held[5], held[3]
    assert holdings.gauges()["host_states"] == 1, "what nobody refers to is gone"


def test_what_an_abandoned_copy_reads_is_kept_until_it_has_ended() -> None:
    holdings = Holdings(
        NBYTES, Counters(), Budgets(device=NBYTES, host=9 * NBYTES), DeviceCopier(Device(), polls=1)
    )
    source = torch.zeros(8)
    held = holdings.hold({"memory.0": source})
    read_by_the_copy = weakref.ref(source)
    holdings.make_room(1, [])
    assert held.tier is Tier.LEAVING
    holdings.fetch(held)
    assert held.tier is Tier.DEVICE
    del held, source
    holdings.poll()
    assert read_by_the_copy() is not None, "the copy is under way"
    holdings.poll()
    assert read_by_the_copy() is None


def test_a_value_that_is_not_finite_stops_that_session_alone_with_its_last_good_state() -> None:
    device = Device(states=6)
    engine = device_engine(device, on_device=4, on_host=20)
    with_sessions(engine, 9)
    settled(engine)
    bad = (*ids(7), POISON, *ids(9))
    events = drain(engine, read("bad", "0", "x", bad), read("good", "1", "y", ids(9)))
    end = last(events, "bad")
    assert isinstance(end, Failed) and end.error == "NotFinite"
    assert exported(engine, "0") == expected(ids(20, 0))
    with_more = drain(engine, *(read(f"t{i}", str(i), f"t{i}", ids(9)) for i in range(2, 9)))
    assert all(isinstance(e, Advanced) for e in with_more if not isinstance(e, Progress))
    assert isinstance(drain(engine, read("again", "0", "x", ids(9)))[-1], Advanced)
    assert exported(engine, "x") == expected(ids(20, 0) + ids(9))


def test_a_real_model_ends_in_the_same_bits() -> None:
    model = small_model(small_config("mac"))
    dump = partial(dump_state, model_fingerprint="m", numerics={})

    def load(data: bytes):  # type: ignore[no-untyped-def]
        return load_state(data, config=model.config, dtype=torch.float32, model_fingerprint="m")[0]

    nbytes = sum(t.numel() * 4 for t in model.initial_state().tensors.values())
    found = []
    for budgets in (None, Budgets(device=4 * nbytes, host=20 * nbytes)):
        engine = Engine(model, INFO, Limits(max_ingest_tokens=64), dump, load, budgets, PlainCopier())
        for i in range(6):
            drain(engine, read(f"r{i}", INITIAL, f"a{i}", random_tokens(60, i)))
        for i in range(6):
            drain(engine, answer(f"g{i}", f"a{i}", f"b{i}", random_tokens(5, 9), max_tokens=20, seed=i))
        found.append([drain(engine, Export(request_id="e", handle=f"b{i}"))[-1] for i in range(6)])
        moved = stats(engine)["states_moved_in_total"]
        assert (moved > 3) == (budgets is not None)
    assert all(isinstance(event, Exported) for event in found[0]) and found[0] == found[1]


def test_a_state_in_one_allocation_is_one_copy_and_comes_back_as_one() -> None:
    layout = BlobLayout({"a": ((2, 3), torch.float32), "b": ((2, 5), torch.bfloat16)})
    blob = layout.empty(torch.device("cpu"))
    blob.copy_(torch.arange(layout.nbytes) % 251)
    there = PlainCopier().out(layout.views(blob)).tensors
    host = layout.blob_of(there)
    assert host is not None and torch.equal(host, blob), "padding and all: it was one copy"
    scattered = {name: view.clone() for name, view in there.items()}
    back = PlainCopier().out(scattered).tensors
    assert layout.blob_of(back) is not None
    assert all(torch.equal(back[n].view(torch.uint8), scattered[n].view(torch.uint8)) for n in back)


def test_loaded_states_have_their_place_too() -> None:
    device = Device(states=6)
    engine = device_engine(device, on_device=4, on_host=20)
    with_sessions(engine, 6)
    data = exported(engine, "0")
    for i in range(6):
        end = drain(engine, Load(request_id=f"l{i}", handle=f"l{i}", data=data))[-1]
        assert isinstance(end, Loaded)
    assert settled(engine)["device_states"] <= 4
    assert exported(engine, "l5") == data
