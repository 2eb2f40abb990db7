"""The trace's part of ``make bench``, at toy size: it finds what it clocks, and counts every chunk."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from mnemosyne.checkpoints.weights import load_checkpoint, shipped


def test_it_measures(script: Callable[[str], ModuleType]) -> None:
    result, rows = script("bench_trace").measure_trace(load_checkpoint(shipped()), 1024)
    assert 0 < result["share"] < 1 and result["tokens"] >= 1024 and len(rows) == 2


def test_chunks_that_nobody_was_told_of_have_no_number(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench_trace")
    read = bench._read
    monkeypatch.setattr(bench, "_read", lambda *given: read(*given)[1:])
    with pytest.raises(bench.CheckFailed, match="isn't of the chunks"):
        bench.measure_trace(load_checkpoint(shipped()), 1024)
