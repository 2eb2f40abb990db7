"""The bench of several devices at toy size, and that a wrong result has no number."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]


@pytest.mark.slow
def test_the_whole_runs_at_toy_size(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--sessions 2 --tokens 512 --piece 128 --answer 16 --dtype float32 --threads 1".split()
    status = script("bench_devices").main(["--devices", "cpu,cpu", "--preset", "tiny", *sizes])
    before, _, last = capsys.readouterr().out.strip().rpartition("\n")
    result = json.loads(last)
    assert status == 0 and result["correct"], before
    assert result["several"]["sessions_by_device"] == {"cpu#0": 1, "cpu#1": 1}
    assert result["several"]["move"]["bytes"] > result["several"]["state_bytes"]
    for what in ("ingest", "decode"):
        assert result["one"][f"{what}_tokens_per_second"] > 0, what
        assert f"{what}, tokens/s of all sessions" in before


def outcome(**changes: Any) -> dict[str, Any]:
    made = {"numerics": {"kind": "a"}, "digests": ["x", "y"], "answers": [[1], [2]]}
    return made | {"balance": {"digests": {1: "y", 7: "z"}}} | changes


def test_a_wrong_result_has_no_number(script: Script) -> None:
    bench = script("bench_devices")
    bench.check(outcome(), outcome())
    for wrong, said in (
        (outcome(numerics={"kind": "b"}), "compute otherwise"),
        (outcome(digests=["x", "z"]), "1 of 2 sessions have other digests"),
        (outcome(answers=[[2], [3]]), "2 of 2 sessions have other answers"),
        (outcome(balance={"digests": {1: "x"}}), "session 1 has another state"),
    ):
        with pytest.raises(bench.Wrong, match=said):
            bench.check(outcome(), wrong)
