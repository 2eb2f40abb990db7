"""How much memory there is for states, by what a system says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mnemosyne.engine import room
from mnemosyne.engine.errors import ConfigError
from mnemosyne.engine.tiers import Budgets

CUDA = torch.device("cuda")
FREE_ON_HOST = room.free_on_host


@pytest.fixture(autouse=True)
def a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_on", lambda device: 8000)
    monkeypatch.setattr(room, "free_on_host", lambda: 4000)


def test_a_cpu_has_one_place() -> None:
    assert room.budgets(torch.device("cpu"), 10) is None
    with pytest.raises(ConfigError, match="host_state_bytes"):
        room.budgets(torch.device("cpu"), 10, host_bytes=5)


def test_defaults_follow_from_what_is_free_and_engines_share_the_host() -> None:
    assert room.budgets(CUDA, 10) == Budgets(device=6000, host=2000)
    assert room.budgets(CUDA, 10, engines=4) == Budgets(device=6000, host=500)
    assert room.budgets(CUDA, 10, 80, 0) == Budgets(device=80, host=0)


def test_too_little_to_compute_with_is_refused_by_the_settings_name() -> None:
    assert room.budgets(CUDA, 1000) == Budgets(device=6000, host=2000)
    for nbytes, budgets in ((1001, ()), (1000, (2999, 9000)), (1000, (7000, 999))):
        with pytest.raises(ConfigError, match=r"device_state_bytes.* must hold 3 of them.*host_state_bytes"):
            room.budgets(CUDA, nbytes, *budgets)


@pytest.mark.parametrize(
    ("limit", "current", "free"),
    [("max", "5", 2048 * 1000), ("900000", "100000", 800_000), ("10", "20", 0), (None, None, 2048 * 1000)],
)
def test_what_a_container_is_allowed_counts(
    tmp_path: Path, limit: str | None, current: str | None, free: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   2000 kB\n")
    if limit is not None and current is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(current + "\n")
    assert FREE_ON_HOST(tmp_path / "meminfo", tmp_path) == free


def test_a_system_that_does_not_say_has_none(tmp_path: Path) -> None:
    assert FREE_ON_HOST(tmp_path / "nowhere", tmp_path) == 0
