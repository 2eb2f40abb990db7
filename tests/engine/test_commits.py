"""What came of committed chunks: every number in its own place, and a session that isn't finite alone."""

from __future__ import annotations

import numpy as np
import torch

from mnemosyne.engine.chunk_trace import ChunkTrace
from mnemosyne.engine.commits import Committed, outcomes
from mnemosyne.engine.errors import NotFinite
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace

CHUNK = 16


def state(position: int) -> SessionState:
    return SessionState(position, {"memory.0": torch.zeros(2)})


def test_numbers_come_to_the_fields_of_their_names() -> None:
    layers = np.array([[1.0, 10.0, 100.0, 5.0], [3.0, 30.0, 300.0, 7.0]], np.float32)
    unknown = layers * [1, 1, 1, np.nan]
    trace = Trace(np.stack([layers, unknown])[None], np.array([[0.25, 0.0]]), None, np.array([True]))
    (found,) = outcomes([state(32)], [state(64)], trace, CHUNK)
    assert isinstance(found, Committed) and found.state.position == 64
    assert list(found.trace) == [
        ChunkTrace(position=48, surprise=2.0, momentary=20.0, moved=200.0, gain=7.0, written=0.25),
        ChunkTrace(position=64, surprise=2.0, momentary=20.0, moved=200.0, gain=None, written=0.0),
    ]


def test_a_session_that_is_not_finite_is_named_alone() -> None:
    trace = Trace(np.zeros((2, 1, 1, 4), np.float32), np.zeros((2, 1)), None, np.array([True, False]))
    good, bad = outcomes([state(0), state(16)], [state(16), state(32)], trace, CHUNK)
    assert isinstance(good, Committed) and isinstance(bad, NotFinite)
    assert "between tokens 16 and 32" in bad.message
