"""Two states, or what two calls told of the same sessions, side by side. Knows no model."""

from __future__ import annotations

import math

import numpy as np

from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace


def same_bits(got: SessionState, want: SessionState) -> bool:
    """All that a session is, the pyramid too."""
    return got.digest() == want.digest()


def same_trace(got: Trace, want: Trace) -> bool:
    """To the last bit; NaN is NaN."""
    return np.array_equal(got.chunks, want.chunks, equal_nan=True) and np.array_equal(
        got.written, want.written
    )


def errors(got: SessionState, want: SessionState) -> dict[str, float]:
    """By tensor, relative in the Frobenius norm; infinite where a number isn't finite."""
    assert set(got.tensors) == set(want.tensors)
    found = {}
    for name, expected in want.tensors.items():
        distance = (got.tensors[name].double() - expected.double()).norm()
        scale = expected.double().norm()
        error = float(distance / scale) if scale else float(distance)
        found[name] = error if math.isfinite(error) else math.inf
    return found


def trace_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest, relative to the field's largest value; infinite unless the same values are NaN."""
    if got.shape != want.shape or not np.array_equal(np.isnan(got), np.isnan(want)):
        return math.inf
    scale = np.nanmax(np.abs(want), tuple(range(want.ndim - 1)))
    return float(np.nanmax(np.abs(got - want) / np.maximum(scale, 1e-30)))


def told_of(trace: Trace, sessions: list[int]) -> Trace:
    """Of some of its sessions, in this order."""
    assert trace.finite is not None
    tokens = None if trace.tokens is None else trace.tokens[sessions]
    return Trace(trace.chunks[sessions], trace.written[sessions], tokens, trace.finite[sessions])
