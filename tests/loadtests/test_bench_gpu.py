"""The GPU bench itself, on a CPU at toy size: the whole of it, and which result makes it refuse a number."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mnemosyne.engine.model import Titans
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.runner import Model
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace

Script = Callable[[str], ModuleType]
OWN = "ingest,aggregate,decode,switch,long"
LARGE = 4
"""Sessions with which every model is checked."""


@pytest.fixture
def bench(script: Script, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With the smallest plan, and rates that needn't be measured."""
    found = script("bench_gpu")
    rates = script("roofline").Rates(gemm=1e12, copy=1e11, host=1e10)
    monkeypatch.setattr(script("bench_gpu_card").Card, "rates", lambda _: rates)
    return found


def run(bench: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """Exit status, the last line, and everything before it."""
    status = bench.main(["--device", "cpu", *arguments])
    out = capsys.readouterr().out
    before, _, last = out.strip().rpartition("\n")
    return status, json.loads(last), before


def lines(result: Any, words: str) -> list[Any]:
    return [line for line in result["lines"] if words in line["what"]]


def test_the_whole_runs_at_toy_size_and_says_that_it_is_a_trial(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result, told = run(bench, capsys, "--only", OWN, "--commit", "abc")
    assert status == 0 and result["correct"] and result["trial"]
    assert "TRIAL on a CPU" in told and "commit abc" in told
    assert not lines(result, "share of chunks written")[0]["value"] < 1
    assert not any("verdict" in line for line in result["lines"])
    for variant in ("MAC", "MAG"):
        parameters = result["models"][f"tiny {variant}"]["parameters"]
        assert f"tiny {variant} {parameters:,} parameters" in told
    for words in ("one stream, 512 tokens", "6 streams", "batch 5", "switched in", "one stream, 1,024"):
        (line, *_) = lines(result, words)
        assert line["value"] > 0 and line["share"] > 0 and line["limit"] > 0 and line["limit_is"]
    (grown,) = lines(result, "device memory grown")
    assert grown["value"] == 0.0


class Wrong:
    """A model that satisfies ``runner.Model`` and computes something else, one way or another."""

    def __init__(self, model: Titans, fault: str) -> None:
        self._model, self._fault = model, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prefill(
        self, states: Sequence[SessionState], tokens: torch.Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace]:
        after, trace = self._model.prefill(states, tokens, per_token)
        amount = {
            "among others": 1e-7 if len(states) > 1 else 0.0,
            "in a large batch": 1e-7 if len(states) > LARGE else 0.0,
            "far": 1e-1,
            "infinite": math.inf if tokens.shape[1] >= 128 and states[0].position >= 128 else 0.0,
        }.get(self._fault, 0.0)
        if amount:
            with torch.inference_mode():
                for state in after:
                    state.tensors["memory.0"].add_(amount)
        return after, trace

    def decode(self, chunks: Sequence[OpenChunk], tokens: torch.Tensor) -> torch.Tensor:
        logits = self._model.decode(chunks, tokens)
        least = {"token by token": 1, "in a large batch": LARGE}.get(self._fault, len(chunks))
        return logits * (1 + 1e-6) if len(chunks) > least else logits


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("among others", "isolation"),
        ("token by token", "isolation"),
        ("far", "from float32"),
        ("infinite", "isn't finite"),
    ],
)
def test_a_wrong_result_has_no_number(
    bench: ModuleType,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    reason: str,
) -> None:
    def served(titans: Titans, card: object) -> tuple[Model, str]:
        return Wrong(titans, fault), "a wrong one"

    monkeypatch.setattr(script("bench_gpu_model"), "_served", served)
    status, result, _ = run(bench, capsys, "--only", "ingest")
    assert status == 1 and not result["correct"]
    assert all("value" not in line for line in result["lines"])
    assert all(line["failed"] and reason in line["why"] for line in result["lines"])


def test_bits_that_depend_on_many_others_are_found_where_they_are_measured(
    bench: ModuleType, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def served(titans: Titans, card: object) -> tuple[Model, str]:
        return Wrong(titans, "in a large batch"), "a wrong one"

    monkeypatch.setattr(script("bench_gpu_model"), "_served", served)
    status, result, _ = run(bench, capsys, "--only", "aggregate,decode")
    assert status == 1
    wrong = [line for line in result["lines"] if line["failed"]]
    assert [line["what"].partition(",")[0] for line in wrong] == [
        "tiny MAC: aggregate",
        "tiny MAC: decoded tokens/s",
        "tiny MAG: aggregate",
    ]
    assert all("isolation" in line["why"] and "value" not in line for line in wrong)
    assert lines(result, "batch 1,")[0]["value"] > 0 and not lines(result, "streams")


def test_a_part_that_fails_leaves_the_others(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error [700]: an illegal access")

    monkeypatch.setitem(bench.PARTS, "aggregate", broken)
    status, result, told = run(bench, capsys, "--only", "aggregate,switch")
    assert status == 1 and not result["correct"]
    (bad, _) = lines(result, "aggregate")
    assert bad["failed"] and "illegal access" in bad["why"] and "CUDA error [700]" in told
    assert lines(result, "switched in")[0]["value"] > 0


def test_what_there_is_no_time_for_is_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status, result, _ = run(bench, capsys, "--only", "ingest", "--seconds", "0")
    assert status == 0
    assert [line["why"] for line in result["lines"]] == ["the time was up"] * 2


def test_a_peer_that_is_not_there_is_left_out_with_a_line(script: Script, tmp_path: Path) -> None:
    peers = script("bench_gpu_peers")
    ours = peers.Ours("tiny MAC", 64, 256, 1000, {128: 1.0}, 1.0)
    plan = script("bench_gpu_plan").TOY
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['titans_pytorch'] = None\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        _, told = peers.measure_peer("titans-pytorch", ours, plan, "cpu", 60.0)
    assert [line.failed for line in told] == [False]
    assert "--wheels" in told[0].why


def test_batches_that_do_not_fit_are_named(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    card = script("bench_gpu_card").Card("cpu")
    subject = script("bench_gpu_model").make("tiny", "mac", card)
    monkeypatch.setattr(type(card), "free", lambda _: 2 * subject.state_bytes)
    rates = script("roofline").Rates(gemm=1e12, copy=1e11, host=1e10)
    decode = script("bench_gpu_decode").measure_decode
    told = decode(subject, rates, script("bench_gpu_plan").TOY, math.inf)
    one, *_, five = told
    assert one.value > 0 and five.value is None and not five.failed
    assert "are free" in five.why


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({"value": 70.0, "limit": 100.0, "least": 10.0, "aim_share": 0.6}, "aim"),
        ({"value": 50.0, "limit": 100.0, "least": 10.0, "aim_share": 0.6}, "least"),
        ({"value": 5.0, "limit": 100.0, "least": 10.0, "aim_share": 0.6}, "missed"),
        ({"value": 45.0, "limit": 100.0, "least_share": 0.4, "aim_share": 0.6}, "least"),
        ({"value": 0.0, "least": 32.0, "aim": 0.0, "at_most": True}, "aim"),
        ({"value": 33.0, "least": 32.0, "aim": 0.0, "at_most": True}, "missed"),
        ({"value": 5.0}, ""),
        ({"value": None, "least": 1.0}, ""),
    ],
)
def test_a_line_says_what_it_reached(script: Script, given: dict[str, Any], verdict: str) -> None:
    assert script("bench_gpu_report").Line("", **given).verdict == verdict


def test_a_script_runs_from_a_checkout_that_is_not_installed(script: Script, tmp_path: Path) -> None:
    runner = script("uninstalled")
    asking = tmp_path / "asking.py"
    asking.write_text("import sys, mnemosyne.engine.config as c; print(c.__file__, *sys.argv[1:])\n")
    command = [sys.executable, str(runner.__file__), str(asking), "--only", "ingest"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert out.split() == [
        str(runner.linked(runner.ROOT) / "mnemosyne/engine/config.py"),
        "--only",
        "ingest",
    ]
