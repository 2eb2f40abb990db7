"""What a token must cost, counted by hand: each number here was worked out on paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mnemosyne.engine.config import MemoryConfig, ModelConfig, Variant, preset


@pytest.fixture
def roofline(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("roofline")


def by_hand(variant: Variant) -> ModelConfig:
    """d = 128, f = 320, H = 2, d_h = 64, h = 256: P = 32,768, P' = 16,384, sum(in + out) = 640."""
    return ModelConfig(
        variant=variant,
        layers=3,
        dim=128,
        vocab_size=1000,
        ffn_dim=320,
        chunk=64,
        segment=512,
        window=256,
        persistent=8,
        memory=MemoryConfig(depth=2, expansion=4),
    )


DENSE = {"SwiGLU": 245_760, "gates": 3_072}
MEMORY = {"update": 458_752, "read": 344_064}
"""Of two heads: 14 * 64 * 256 = 229,376 each; 8 * 64 * 256 + 4 * 64 * 320 / 2 = 172,032 each."""


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("mac", {"projections": 393_216, "attention": 266_240, "recall": 131_072} | DENSE | MEMORY),
        ("mag", {"projections": 294_912, "attention": 135_168} | DENSE | MEMORY),
        ("mal", {"projections": 294_912, "attention": 135_168} | DENSE | MEMORY),
        ("lmm", {"projections": 163_840} | DENSE | MEMORY),
    ],
)
def test_the_operations_of_an_ingested_token(
    roofline: ModuleType, variant: Variant, expected: dict[str, int]
) -> None:
    parts = roofline.ingest_operations(by_hand(variant))
    assert {part.name: part.value for part in parts} == {name: 3 * n for name, n in expected.items()}
    assert all(part.formula for part in parts)


def test_a_head_costs_what_it_is_known_to(roofline: ModuleType) -> None:
    """Per head at width 256 and chunk 64: update 14 * 64 * 256, read at the segment's start 4 * 64 * 256; the
    read of a token 213k, of which 82k stand in the square of a chunk, and half of that is causal."""
    values = {part.name: part.value / (24 * 24) for part in roofline.ingest_operations(preset("760M"))}
    assert values["update"] == 229_376
    assert values["recall"] == 65_536
    assert values["read"] == 212_992 - 81_920 / 2


def test_a_decoded_token_reads_weights_once_and_each_state(roofline: ModuleType) -> None:
    shared, of_each = roofline.decode_bytes(by_hand("mac"), 2)
    assert {part.name: part.value for part in shared} == {
        "weights": 3 * (2 * (12 * 128 * 128 + 3 * 128 * 320) + 4 * 1536),
        "head": 512_000,
        "persistent tokens": 3 * 4096,
    }
    assert {part.name: part.value for part in of_each} == {
        "M*, M and S": 3 * 655_360,  # 2 of 4 bytes and 1 of 2, 2 heads, 32,768 weights
        "keys and values of x and h": 3 * 262_144,  # 4 of 256 rows of 128 numbers of 2 bytes
        "open chunk": 3 * 81_920,  # 2 heads, 32 rows of 640 numbers of 2 bytes
    }
    one, many = (roofline.decode(by_hand("mac"), 2, batch) for batch in (1, 64))
    assert many.nbytes - one.nbytes == 63 * sum(part.value for part in of_each)
    assert many.operations == 64 * one.operations


def test_a_window_is_read_whole_and_a_lone_memory_has_none(roofline: ModuleType) -> None:
    names = {part.name: part.value for part in roofline.decode_bytes(by_hand("mag"), 2)[1]}
    assert names["keys and values"] == 3 * 2 * 256 * 128 * 2
    assert names["M and S"] == 3 * 393_216
    assert {part.name for part in roofline.decode_bytes(by_hand("lmm"), 2)[1]} == {"M and S", "open chunk"}


def test_the_larger_of_the_two_is_the_limit_and_is_named(roofline: ModuleType) -> None:
    rates = roofline.Rates(gemm=800e12, copy=4e12, host=50e9)
    counted = roofline.Work(operations=1.6e12, nbytes=4e9)
    assert roofline.seconds(counted, rates) == pytest.approx(2e-3)
    assert roofline.explained(counted, rates) == "1.6 TFLOP / 800 TFLOP/s"
    moved = roofline.Work(operations=1.6e9, nbytes=4e9)
    assert roofline.seconds(moved, rates) == pytest.approx(1e-3)
    assert roofline.explained(moved, rates) == "4 GB / 4 TB/s"


def test_the_segment_bounds_a_lone_stream_of_mac_alone(roofline: ModuleType) -> None:
    config = by_hand("mac")
    weights = roofline.decode_bytes(config, 2)[0][0].value
    states = 2 * 3 * 655_360
    assert roofline.ingest(config, 2).nbytes == (weights + states) / 512
    assert roofline.ingest(config, 2, sessions=4).nbytes == (weights / 4 + states) / 512
    assert roofline.ingest(by_hand("mag"), 2).nbytes == 0


def test_the_limits_of_the_largest_preset_lie_where_they_are_expected(roofline: ModuleType) -> None:
    """At 790 TFLOP/s and 4.3 TB/s: near 0.29M tokens/s, and 1.7k tokens/s at batch 1."""
    rates = roofline.Rates(gemm=790e12, copy=4.3e12, host=50e9)
    config = preset("760M")
    assert 1 / roofline.seconds(roofline.ingest(config, 2), rates) == pytest.approx(0.29e6, rel=0.05)
    assert 1 / roofline.seconds(roofline.decode(config, 2, 1), rates) == pytest.approx(1.7e3, rel=0.15)


@pytest.mark.parametrize("variant", ["mac", "mag"])
@pytest.mark.parametrize("name", ["170M", "760M"])
def test_the_page_of_benchmarks_says_what_is_counted(
    roofline: ModuleType, name: str, variant: Variant
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", page, re.MULTILINE))
    column = ["170M mac", "170M mag", "760M mac", "760M mag"].index(f"{name} {variant}") - 4
    parts = {part.name: part.value for part in roofline.ingest_operations(preset(name, variant))}
    for what, value in parts.items():
        row = rows["recall with M*" if what == "recall" else what]
        assert row.split("|")[column].strip() == f"{value / 1e6:,.1f}", what
    assert rows["together"].split("|")[column].strip() == f"{sum(parts.values()) / 1e6:,.0f}"
