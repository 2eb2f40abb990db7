"""The scheduling policy: fairness, no starvation, budgets, limits."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest

from mnemosyne.engine.cap import PATIENCE
from mnemosyne.engine.errors import ContextTooLong, QueueFull
from mnemosyne.engine.scheduler import Limits, Scheduler

CHUNK = 64


def scheduler(**limits: float) -> Scheduler:
    made = Scheduler(Limits(**{"max_queued_tokens": 1 << 20, **limits}), CHUNK)  # type: ignore[arg-type]
    made.observe(1000, 0.25)  # 4000 tokens/s: 15 chunks a step alone, 2 beside decodes
    return made


def ingest(s: Scheduler, item: str, tenant: str, chunks: int) -> None:
    s.accept(item, tenant, chunks * CHUNK)
    s.to_ingest(item, chunks)


def run(s: Scheduler, steps: int) -> Counter[str]:
    """Chunks that each item committed."""
    done: Counter[str] = Counter()
    for _ in range(steps):
        items, chunks = s.next_ingest()
        assert chunks * len(items) <= 16
        for item in items:
            s.ingested(item, chunks)
            done[item] += chunks
    return done


def test_a_lone_session_gets_super_chunks_and_all_of_its_rest() -> None:
    s = scheduler()
    ingest(s, "a", "t", 20)
    assert s.next_ingest() == (("a",), 15)
    s.ingested("a", 15)
    assert s.next_ingest() == (("a",), 5)
    s.ingested("a", 5)
    assert s.next_ingest() == ((), 0) and s.idle


def test_no_more_than_the_longest_super_chunk() -> None:
    s = scheduler(step_seconds=100.0, max_super_chunk=16)
    ingest(s, "a", "t", 100)
    assert s.next_ingest() == (("a",), 16)


def test_ingest_beside_decode_is_small_but_goes_on() -> None:
    s = scheduler()
    ingest(s, "a", "t", 100)
    s.accept("d", "t", 1)
    s.to_decode("d")
    assert s.next_decode() == ("d",)
    assert s.next_ingest() == (("a",), 2)
    s.observe(10, 100.0)  # a step that took far too long
    assert s.next_ingest() == (("a",), 1)


def test_the_first_step_is_one_chunk_until_its_cost_is_known() -> None:
    s = Scheduler(Limits(), CHUNK)
    ingest(s, "a", "t", 100)
    assert s.next_ingest() == (("a",), 1)


def test_sessions_of_a_batch_commit_the_same_number_of_chunks() -> None:
    s = scheduler()
    for i in range(4):
        ingest(s, f"s{i}", "t", 10)
    items, chunks = s.next_ingest()
    assert (items, chunks) == (("s0", "s1", "s2"), 5)  # 15 of 15; all four would use 12
    for item in items:
        s.ingested(item, chunks)
    assert s.next_ingest()[0][0] == "s3"


def test_tenants_share_equally_whatever_the_number_of_their_sessions() -> None:
    s = scheduler()
    for i in range(10):
        ingest(s, f"many{i}", "many", 400)
    ingest(s, "one", "one", 4000)
    done = run(s, 60)
    many = sum(n for item, n in done.items() if item.startswith("many"))
    assert many + done["one"] > 60 * 10
    assert 0.8 < many / done["one"] < 1.25
    shares = [done[f"many{i}"] for i in range(10)]
    assert max(shares) - min(shares) <= 16


def test_who_comes_late_starts_level_and_earns_nothing_by_waiting() -> None:
    s = scheduler()
    ingest(s, "early", "a", 4000)
    run(s, 50)
    ingest(s, "late", "b", 4000)
    done = run(s, 40)
    assert 0.8 < done["early"] / done["late"] < 1.25


def test_returning_again_and_again_is_no_advantage() -> None:
    s = scheduler()
    ingest(s, "long", "a", 4000)
    total = {"long": 0, "short": 0}
    for i in range(100):
        if f"b{i - 1}" not in s._tenant:
            ingest(s, f"b{i}", "b", 1)
        items, chunks = s.next_ingest()
        for item in items:
            s.ingested(item, chunks)
            total["long" if item == "long" else "short"] += chunks
            if item != "long":
                s.finish(item)
    assert total["long"] >= total["short"]


def test_a_short_rest_is_not_starved_by_long_ones_and_does_not_slow_every_step() -> None:
    s = scheduler()
    for i in range(3):
        ingest(s, f"long{i}", "t", 1000)
    ingest(s, "short", "t", 1)
    done = run(s, 6)
    assert done["short"] == 1
    assert sum(done.values()) > 3 * 15


def test_nobody_waits_forever() -> None:
    s = scheduler()
    for tenant in range(5):
        for i in range(tenant + 1):
            ingest(s, f"{tenant}.{i}", str(tenant), 5 + 7 * i)
    for _ in range(400):
        run(s, 1)
        if s.idle:
            break
    assert s.idle


def test_more_decodes_than_fit_take_turns_and_tenants_share() -> None:
    s = scheduler(max_decode_batch=4)
    for i in range(9):
        s.accept(f"a{i}", "a", 1)
        s.to_decode(f"a{i}")
    s.accept("b", "b", 1)
    s.to_decode("b")
    done: Counter[str] = Counter()
    for _ in range(90):
        items = s.next_decode()
        assert len(items) == 4
        for item in items:
            s.decoded(item)
            done[item] += 1
    assert done["b"] == 90
    assert max(done[f"a{i}"] for i in range(9)) - min(done[f"a{i}"] for i in range(9)) <= 1


def test_a_burst_is_not_held_against_a_tenant_for_long() -> None:
    s = scheduler(max_decode_batch=4)
    for i in range(3):
        s.accept(f"a{i}", "a", 1)
        s.to_decode(f"a{i}")
    s.accept("b0", "b", 1)
    s.to_decode("b0")
    for _ in range(1000):  # there was room for everyone
        for item in s.next_decode():
            s.decoded(item)
    for i in range(1, 9):
        s.accept(f"b{i}", "b", 1)
        s.to_decode(f"b{i}")
    served = 0
    for _ in range(10):
        for item in s.next_decode():
            s.decoded(item)
            served += item.startswith("a")
    assert served >= 10


def test_the_order_of_a_batch_is_that_of_acceptance() -> None:
    s = scheduler()
    for name in ("x", "m", "b"):
        s.accept(name, "t" + name, 1)
        s.to_decode(name)
    s.decoded("x")
    assert s.next_decode() == ("x", "m", "b")


def test_limits() -> None:
    s = scheduler(max_requests=3, max_queued_tokens=1000)
    with pytest.raises(ContextTooLong, match="1001"):
        s.accept("huge", "t", 1001)
    s.accept("a", "t", 600)
    with pytest.raises(QueueFull, match="600 tokens"):
        s.accept("b", "t", 401)
    s.accept("b", "t", 400)
    s.accept("c", "t", 0)
    with pytest.raises(QueueFull, match="3 requests"):
        s.accept("d", "t", 0)
    s.to_ingest("a", 9)
    s.ingested("a", 8)
    assert s.queued_tokens == 600 - 8 * CHUNK + 400
    s.finish("b")
    s.finish("b")
    s.accept("d", "t", 500)
    assert s.requests == 3


def test_a_gpu_is_given_more_at_once_and_a_setting_beats_the_default() -> None:
    cpu, cuda = Limits.for_device("cpu"), Limits.for_device("cuda")
    assert cpu == Limits()
    assert (cuda.max_super_chunk, cuda.max_ingest_tokens, cuda.max_queued_tokens) == (2048, 131_072, 1 << 21)
    assert (cuda.max_ingest_batch, cuda.max_decode_batch, cuda.step_seconds) == (64, 256, 1.0)
    assert cuda.decode_pause_seconds == cpu.decode_pause_seconds
    assert Limits.for_device("cuda", 5000) == replace(cuda, max_queued_tokens=5000)


def test_a_step_takes_no_more_sessions_than_there_is_room_for() -> None:
    s = scheduler()
    for i in range(4):
        ingest(s, f"s{i}", "t", 10)
    assert s.next_ingest(2) == (("s0", "s1"), 7)
    assert s.next_ingest(0) == s.next_ingest(-3) == (("s0",), 10), "one always goes"


def test_what_was_too_large_is_not_tried_again_soon() -> None:
    s = scheduler(step_seconds=100.0, max_super_chunk=1 << 10, max_ingest_tokens=100 * CHUNK)
    for i in range(3):
        ingest(s, f"s{i}", "t", 1000)
    assert s.next_ingest() == (("s0", "s1"), 50)
    assert s.ingest_too_large(100)
    assert s.next_ingest() == (("s0", "s1"), 25)
    assert s.ingest_too_large(50) and s.ingest_too_large(25) and s.ingest_too_large(12)
    assert s.next_ingest() == (("s0", "s1", "s2"), 2)
    assert s.ingest_too_large(2)
    assert s.next_ingest() == (("s0",), 1)
    assert not s.ingest_too_large(1), "there is nothing smaller"
    for _ in range(PATIENCE):
        s.observe(1000, 0.25)
    assert s.next_ingest() == (("s0", "s1"), 1)


def test_decodes_that_were_too_many_take_turns() -> None:
    s = scheduler()
    for i in range(8):
        s.accept(f"d{i}", "t", 1)
        s.to_decode(f"d{i}")
    assert s.decode_too_large(8)
    assert len(s.next_decode()) == 4
    assert s.decode_too_large(4) and s.decode_too_large(2) and not s.decode_too_large(1)
    done: Counter[str] = Counter()
    for _ in range(24):
        for item in s.next_decode():
            s.decoded(item)
            done[item] += 1
    assert set(done.values()) == {3}


def test_to_choose_a_step_of_a_gpu_takes_no_time() -> None:
    s = Scheduler(Limits.for_device("cuda"), CHUNK)
    s.observe(100_000, 0.2)
    rng = random.Random(1)
    for i in range(200):
        ingest(s, f"s{i}", f"t{i % 5}", rng.randrange(1, 150))
    began = time.perf_counter()
    items, chunks = s.next_ingest()
    assert time.perf_counter() - began < 0.1, "a look at each of 2048 lengths took far longer"
    assert len(items) * chunks > 1000


def test_the_policy_needs_no_torch() -> None:
    code = (
        "import sys, mnemosyne.engine.scheduler; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
