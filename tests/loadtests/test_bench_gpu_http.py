"""The HTTP bench itself, on a CPU at toy size: a real engine, a real server, real streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mnemosyne.server.sessions.tokens import TextTokenizer

Script = Callable[[str], ModuleType]


@pytest.fixture
def bench(script: Script, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = script("bench_gpu_http")
    monkeypatch.setenv("MNEMOSYNE_THREADS", "1")
    monkeypatch.setattr(found, "TOY", replace(found.TOY, counts=(2,), rounds=1, context=16, piece=128))
    return found


def run(bench: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    status = bench.main(["--device", "cpu", "--tokens", "256", *arguments])
    before, _, last = capsys.readouterr().out.strip().rpartition("\n")
    return status, json.loads(last), before


def test_the_same_is_asked_of_an_engine_and_of_a_server(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result, told = run(bench, capsys)
    assert status == 0 and result["correct"], told
    assert "TRIAL on a CPU" in told and told.count("engine / HTTP: TTFT, ms") == 2
    alone, beside = result["tiny"]["streams"]
    assert [alone["beside"], beside["beside"]] == [False, True]
    for which in (alone, beside):
        for path in ("engine", "http"):
            assert which[path]["answers"] == 2
            assert which[path]["itl_seconds"] > 0 and which[path]["ttft_seconds"] > 0
    # Through HTTP a count comes with each piece of a document, which may be longer than these streams.
    assert beside["engine"]["read_tokens_per_second"] > 0
    assert alone["engine"]["read_tokens_per_second"] == alone["http"]["read_tokens_per_second"] == 0
    seconds, speed = result["tiny"]["lines"]
    assert seconds["value"] > 0 and speed["share"] > 0


def test_a_state_that_differs_stops_it_before_any_time(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fake:
        async def of_engine(self, parts: list[str]) -> tuple[bytes, list[Any], float]:
            return b"", [], 0.0

        def of_server(self, *_: object) -> None:
            raise bench.CheckFailed("the state of a text isn't the engine's own")

    monkeypatch.setattr(bench, "Bench", lambda *_: Fake())
    status, result, _ = run(bench, capsys, "--only", "long")
    assert status == 1 and not result["correct"]
    assert "isn't the engine's own" in result["tiny"]["lines"][0]["why"]
    assert "value" not in result["tiny"]["lines"][0]


def test_a_sample_counts_from_the_request_and_between_tokens(script: Script) -> None:
    streams = script("bench_gpu_streams")
    assert streams.sample(10.0, [10.5, 10.75, 11.5]) == (0.5, 0.5)
    measured = streams.Measured(2, False, [(0.5, 0.25), (0.75, 0.5), (4.0, 0.5)], 0.0)
    assert (measured.first, measured.between) == (0.75, 0.5)
    assert measured.facts()["ttft_p99_seconds"] == 4.0


def test_a_random_checkpoint_has_the_preset_s_vocabulary_and_the_shipped_words(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = script("bench_gpu_checkpoint")
    wide = replace(script("bench_gpu_model").config_of("tiny", "mac"), vocab_size=7000)
    monkeypatch.setattr(made, "config_of", lambda *_: wide)
    monkeypatch.setattr(made, "TRIAL", "")
    first = made.random_checkpoint(tmp_path / "a", "tiny", "mac", torch.device("cpu"))
    again = made.random_checkpoint(tmp_path / "b", "tiny", "mac", torch.device("cpu"))
    assert first.fingerprint == again.fingerprint
    words = TextTokenizer.from_file(first.tokenizer_path)
    (the,) = words.encode(" the")
    assert the < 6144
    assert words.token_bytes(6999) == b"<unused6999>"
