"""What the engine says of the memory, summed up: the same however its chunks came."""

from __future__ import annotations

import random

import pytest

from mnemosyne.engine.chunk_trace import ChunkTrace, ChunkTraces
from mnemosyne.engine.messages import Progress
from mnemosyne.server.sessions.trace import Trace

CHUNKS = [
    ChunkTrace(64 * i, rng.random(), rng.random(), rng.random(), rng.random() if i % 5 == 0 else None, i / 40)
    for rng in [random.Random(1)]
    for i in range(1, 41)
]


def summed(*cuts: int) -> Trace:
    trace = Trace()
    for first, last in zip((0, *cuts), (*cuts, len(CHUNKS)), strict=True):
        trace.add(Progress(request_id="r", tokens_done=0, trace=ChunkTraces.of(CHUNKS[first:last])))
    return trace


def test_means_and_the_largest_gain() -> None:
    found = summed().data()
    assert (found["position"], found["chunks"]) == (64 * 40, 40)
    for name in ("surprise", "momentary", "moved", "written"):
        assert found[name] == pytest.approx(sum(getattr(chunk, name) for chunk in CHUNKS) / 40)
    assert found["gain"] == max(chunk.gain for chunk in CHUNKS if chunk.gain is not None)


@pytest.mark.parametrize("cuts", [(1,), (0, 13, 13), tuple(range(1, 40)), (39,)])
def test_no_bit_depends_on_how_the_chunks_came(cuts: tuple[int, ...]) -> None:
    assert summed(*cuts).data() == summed().data()


def test_nothing_read_has_no_mean() -> None:
    assert Trace().surprise is None and Trace().gain is None
    assert summed(3).surprise == summed().data()["surprise"]
