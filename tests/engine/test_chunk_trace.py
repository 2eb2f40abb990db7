"""Chunks as one array are the chunks that they were made of."""

from __future__ import annotations

import math

import numpy as np

from mnemosyne.engine.chunk_trace import NO_CHUNKS, ChunkTrace, ChunkTraces

FIRST = ChunkTrace(64, 0.1, 1e-300, 2.0, 0.5, 1 / 3)
SECOND = ChunkTrace(128, 0.2, 0.0, 3.0, None, 0.0)


def test_they_come_back_as_they_were() -> None:
    traces = ChunkTraces.of([FIRST, SECOND])
    assert list(traces) == [FIRST, SECOND] and len(traces) == 2
    assert type(next(iter(traces)).position) is int
    assert list(NO_CHUNKS) == [] and len(NO_CHUNKS) == 0


def test_a_column_is_a_field_of_all() -> None:
    traces = ChunkTraces.of([FIRST, SECOND])
    assert traces.column("position").tolist() == [64, 128]
    assert traces.column("written").tolist() == [1 / 3, 0]
    assert np.isnan(traces.column("gain")).tolist() == [False, True]


def test_equal_are_those_whose_numbers_all_are() -> None:
    assert ChunkTraces.of([FIRST, SECOND]) == ChunkTraces.of([FIRST, SECOND._replace(gain=math.nan)])
    assert ChunkTraces.of([FIRST]) != ChunkTraces.of([FIRST._replace(written=0.0)])
    assert ChunkTraces.of([FIRST]) != ChunkTraces.of([FIRST, SECOND])
    assert len({ChunkTraces.of([FIRST]), ChunkTraces.of([FIRST])}) == 1
