"""The training bench at toy size: it measures, and a wrong gradient has no number."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_it_measures(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    assert script("bench_training").main(["--device", "cpu", "--commit", "x"]) == 0
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert told["correct"] and told["commit"] == "x" and "TRIAL" in out
    assert len(told["lines"]) == 6 and all(line["value"] > 0 for line in told["lines"])


def test_a_gradient_that_differs_has_no_number(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench_training")
    right = bench.gradients
    calls = []

    def wrong(*given: object) -> dict[str, torch.Tensor]:
        calls.append(given)
        scale = 1.01 if len(calls) == 1 else 1.0
        return {name: scale * g if "conv" in name else g for name, g in right(*given).items()}

    monkeypatch.setattr(bench, "gradients", wrong)
    assert bench.main(["--device", "cpu"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not told["correct"] and len(told["lines"]) == 1 and "value" not in told["lines"][0]
    assert "conv is off by 1.0e-02" in json.dumps(told)


def test_a_device_on_which_no_kernel_runs_has_no_number(script: Callable[[str], ModuleType]) -> None:
    bench = script("bench_training")
    card = SimpleNamespace(device=torch.device("cpu"), trial=False)
    with pytest.raises(bench.CheckFailed, match="don't run here"):
        bench.check(card, bench.settings(2, 64, 256), 256)
