"""The pyramid against all chunks, kept whole: any split, what is kept of the past, what is unknown."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mnemosyne.engine.pyramid import FIELDS, GAIN, LEVELS, POINTS, Pyramid, overall

LAYERS = 3


def chunks(count: int, seed: int = 0) -> np.ndarray:
    """Of exact sums: any order of adding them gives the same."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 10, (count, LAYERS, len(FIELDS))).astype(np.float32)


def grown(values: np.ndarray, size: int = 97) -> Pyramid:
    pyramid = Pyramid.blank(LAYERS)
    for first in range(0, len(values), size):
        pyramid = pyramid.extended(values[first : first + size])
    return pyramid


def expected(values: np.ndarray) -> list[list[float]]:
    """In plain Python: the mean of each field, the largest gain."""
    means = []
    for layer in range(LAYERS):
        row = []
        for field in range(len(FIELDS)):
            column = [float(v) for v in values[:, layer, field]]
            row.append(max(column) if field == GAIN else math.fsum(column) / len(column))
        means.append(row)
    return means


@pytest.mark.parametrize("level", [0, 1, 3, 6])
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000, 3001])
def test_every_point_is_what_its_chunks_say(count: int, level: int) -> None:
    values = chunks(count)
    points = list(grown(values).cover(0, count, level))
    assert points[0].first == 0 and points[-1].last == count
    assert all(a.last == b.first for a, b in zip(points, points[1:], strict=False)), "nothing twice, no gap"
    for point in points:
        np.testing.assert_allclose(
            point.values, expected(values[point.first : point.last]), rtol=1e-6, atol=0
        )


def test_the_newest_are_kept_in_detail_and_the_rest_as_finely_as_there_is_room() -> None:
    count = 3000
    points = list(grown(chunks(count)).cover(0, count, 0))
    lengths = [point.last - point.first for point in points]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-POINTS:] == [1] * POINTS
    for point, length in zip(points, lengths, strict=True):
        finer = length.bit_length() - 2  # the level below
        assert finer < 0 or point.first >> finer < (count >> finer) - POINTS, "no finer point is kept"


def test_part_of_the_past() -> None:
    pyramid = grown(chunks(1000))
    assert [(p.first, p.last) for p in pyramid.cover(801, 811, 2)] == [(800, 804), (804, 808), (808, 812)]
    assert [(p.first, p.last) for p in pyramid.cover(990, 10**6, 3)] == [(984, 992), (992, 1000)]
    assert [(p.first, p.last) for p in pyramid.cover(994, 10**6, 4)] == [(992, 1000)], (
        "a point not filled yet"
    )
    assert list(pyramid.cover(1000, 2000, 0)) == []
    [old] = pyramid.cover(3, 4, 0)
    assert (old.first, old.last) == (0, 4), "coarser than asked for, where no finer one is kept"


@pytest.mark.parametrize("sizes", [[1] * 700, [699, 1], [3, 300, 397], [256] * 2 + [188]])
def test_bits_do_not_depend_on_how_the_chunks_came(sizes: list[int]) -> None:
    values = np.random.default_rng(1).random((700, LAYERS, len(FIELDS)), np.float32)
    whole, pyramid, at = Pyramid.blank(LAYERS).extended(values), Pyramid.blank(LAYERS), 0
    for size in sizes:
        pyramid, at = pyramid.extended(values[at : at + size]), at + size
    assert pyramid.chunks == whole.chunks == 700
    assert pyramid.array().tobytes() == whole.array().tobytes()


def test_one_that_was_extended_stays_as_it_was() -> None:
    pyramid = grown(chunks(300))
    before = pyramid.array().tobytes()
    pyramid.extended(chunks(50, seed=1))
    assert pyramid.array().tobytes() == before
    again = Pyramid.of(pyramid.chunks, pyramid.array())
    assert again.extended(chunks(9)).array().tobytes() == pyramid.extended(chunks(9)).array().tobytes()


def test_its_size_does_not_depend_on_what_was_read() -> None:
    assert grown(chunks(5000)).nbytes == Pyramid.blank(LAYERS).nbytes == LEVELS * POINTS * LAYERS * 4 * 4
    newest = [sum(map(len, grown(chunks(count), 1).newest)) for count in (POINTS - 1, POINTS, 3 * POINTS + 7)]
    assert newest == [POINTS - 1, 0, 7]
    assert POINTS << LEVELS - 1 > 500e6 / 64, "so many tokens are remembered at 64 a chunk"


def test_what_is_not_known_is_left_out() -> None:
    pyramid = Pyramid.blank(LAYERS, 100).extended(chunks(20))
    assert [(p.first, p.last) for p in pyramid.cover(0, 120, 3)] == [(104, 112), (112, 120)]
    assert list(Pyramid.blank(LAYERS).cover(0, 10, 0)) == []
    assert list(Pyramid().extended(chunks(5)).cover(0, 5, 0)) == [], "without levels nothing is kept"


def test_a_gain_that_was_measured_now_and_then() -> None:
    values = chunks(21)
    values[np.arange(21) % 5 != 4, :, GAIN] = np.nan
    points = list(grown(values).cover(0, 21, 3))
    assert [point.last for point in points] == [8, 16, 21]
    for point, only in zip(points, ([4], [9, 14], [19]), strict=True):
        assert (point.values[:, GAIN] == values[only, :, GAIN].max(0)).all()
        assert overall(point.values)[GAIN] == values[only, :, GAIN].max()


def test_beyond_the_last_level_the_oldest_is_left_out() -> None:
    start = (POINTS + 3 << LEVELS - 1) - 2
    pyramid = Pyramid.blank(LAYERS, start).extended(chunks(2))
    assert [(p.first, p.last) for p in pyramid.cover(0, start + 2, LEVELS - 1)] == []
    full = Pyramid(pyramid.chunks, tuple(np.ones_like(level) for level in pyramid.levels))
    points = list(full.cover(0, start + 2, LEVELS - 1))
    assert (points[0].first, points[-1].last, len(points)) == (3 << LEVELS - 1, start + 2, POINTS)


def test_all_layers_together() -> None:
    values = chunks(4)
    found = overall(values)
    assert found.shape == (4, len(FIELDS))
    assert (
        found[2, 0] == values[2, :, 0].mean(dtype=np.float64) and found[2, GAIN] == values[2, :, GAIN].max()
    )
