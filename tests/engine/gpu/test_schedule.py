"""Cells and waves: every one once, in time, on one grid. Small cases, all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from mnemosyne.engine.gpu.schedule import BLOCK_CHUNKS, Read, blocks, cell_rows, waves
from tests.engine.gpu.opened import tiny

CHUNK = 4
SIZES = (4, 8, 12)
"""Rows of a cell: one to three chunks."""
PLACES = range(0, 28, CHUNK)
LENGTHS = range(CHUNK, 32, CHUNK)

Batch = Sequence[tuple[int, int]]
"""(position, tokens) of each session."""

BATCHES: list[Batch] = [
    [(0, 4)],
    [(8, 24)],
    [(4, 4), (4, 4), (4, 4)],
    [(0, 12), (4, 12), (8, 12), (20, 12)],
    [(12, 28), (0, 4)],
    [(0, 4), (0, 28), (4, 16)],
]


def rows(batch: Batch, layers: int, size: int, most: int) -> list[list[tuple[int, ...]]]:
    """Wave by wave (session, layer, first token, chunks, absolute position)."""
    reads = [Read(*one) for one in batch]
    return [[tuple(cell) for cell in wave.tolist()] for wave in waves(reads, layers, size, CHUNK, most)]


@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_cut_at_multiples_of_the_size_and_cover_the_call(size: int) -> None:
    for place, length in itertools.product(PLACES, LENGTHS):
        cut = blocks(Read(place, length), size, CHUNK).tolist()
        at = 0
        for first, chunks, position in cut:
            assert first == at and position == place + first and 0 < chunks * CHUNK <= size
            # No cell reaches over a multiple: its first and last token lie between the same two.
            assert position // size == (position + chunks * CHUNK - 1) // size
            at += chunks * CHUNK
        assert at == length
        assert all(position % size == 0 for _, _, position in cut[1:])


@pytest.mark.parametrize("size", SIZES)
def test_any_split_into_calls_gives_the_same_chunks_of_the_same_blocks(size: int) -> None:
    """A chunk is known by the multiple of the size that its cell lies behind, and its place there."""

    def chunks(place: int, length: int) -> list[tuple[int, int]]:
        return [
            (position // size, position % size // CHUNK + i)
            for _, count, position in blocks(Read(place, length), size, CHUNK).tolist()
            for i in range(count)
        ]

    for place, length in itertools.product(PLACES, LENGTHS):
        whole = chunks(place, length)
        for cut in range(CHUNK, length, CHUNK):
            assert chunks(place, cut) + chunks(place + cut, length - cut) == whole


def check(batch: Batch, layers: int, size: int, most: int) -> None:
    """Every cell once, in a later wave than those it waits for."""
    taken = rows(batch, layers, size, most)
    assert all(0 < len(wave) <= most for wave in taken)
    expected = {
        (session, layer, *block)
        for session, one in enumerate(batch)
        for layer in range(layers)
        for block in map(tuple, blocks(Read(*one), size, CHUNK).tolist())
    }
    flat = [cell for wave in taken for cell in wave]
    assert len(flat) == len(expected) and set(flat) == expected
    when = {cell[:3]: wave for wave, cells in enumerate(taken) for cell in cells}
    ends = {(s, layer, first + chunks * CHUNK): (s, layer, first) for s, layer, first, chunks, _ in flat}
    for session, layer, first in when:
        wave = when[session, layer, first]
        assert layer == 0 or when[session, layer - 1, first] < wave
        assert first == 0 or when[ends[session, layer, first]] < wave


def test_a_diagonal_is_cut_evenly_and_the_longest_come_first() -> None:
    batch = [*[(4, 4), (0, 8)] * 3, (4, 4)]
    taken = rows(batch, 1, 8, 3)
    assert [[chunks for _, _, _, chunks, _ in wave] for wave in taken] == [[2, 1, 1], [2, 1], [2, 1]]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_every_cell_once_and_after_those_it_waits_for(batch: Batch) -> None:
    for layers, size, most in itertools.product((1, 2, 3, 5), SIZES, (1, 2, 3, 7, 100)):
        check(batch, layers, size, most)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_any_two_sessions(most: int) -> None:
    one = list(itertools.product(PLACES[:4], LENGTHS[:5]))
    for batch in itertools.product(one, one):
        check(batch, 3, 8, most)


def test_one_long_stream_keeps_as_many_cells_busy_as_there_are_layers() -> None:
    taken = rows([(0, 10 * CHUNK)], 4, CHUNK, 100)
    assert [len(wave) for wave in taken] == [1, 2, 3, *[4] * 7, 3, 2, 1]


def test_a_cell_is_a_segment_where_there_are_segments() -> None:
    assert cell_rows(tiny("mac")) == tiny("mac").segment
    for variant in ("mag", "mal", "lmm"):
        assert cell_rows(tiny(variant)) == BLOCK_CHUNKS * tiny(variant).chunk
