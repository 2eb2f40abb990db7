"""Settings: which source wins, what is refused, and that the documentation names them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mnemosyne.engine.errors import ConfigError
from mnemosyne.server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[3]


def test_a_flag_beats_the_environment_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 1111\nhost = "10.0.0.1"\nlog_level = "debug"\n')
    monkeypatch.setenv("MNEMOSYNE_PORT", "2222")
    monkeypatch.setenv("MNEMOSYNE_HOST", "10.0.0.2")
    settings = Settings.load(config_file=file, port=3333, host=None)
    assert (settings.port, settings.host, settings.log_level) == (3333, "10.0.0.2", "debug")


def test_the_file_may_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 1111\n")
    monkeypatch.setenv("MNEMOSYNE_CONFIG_FILE", str(file))
    assert Settings.load().port == 1111


@pytest.mark.parametrize("flag", [("port", 70_000), ("dtype", "int8"), ("prot", 1), ("config_file", "/none")])
def test_what_is_wrong_is_named(flag: tuple[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"/none" if flag[0] == "config_file" else flag[0]):
        Settings.load(**dict([flag]))


@pytest.mark.parametrize(
    "device", ["cpu", "cuda", "cuda:1", "cuda:0,cuda:1", "cuda,cuda:1", "cuda:all", "cpu,cpu"]
)
def test_one_device_or_several_of_a_kind(device: str) -> None:
    assert Settings.load(device=device).device == device


@pytest.mark.parametrize(
    "device", ["", "gpu", "cpu,cuda:0", "cuda:0,", "cuda:all,cuda:0", "cuda:0,cuda", "cpu, cpu"]
)
def test_no_other_devices(device: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.load(device=device)
    assert str(refused.value) == (
        f"settings: device: {device!r} is none; cpu, cuda, several as cuda:0,cuda:1, or cuda:all are"
    )


@pytest.mark.parametrize(("device", "most"), [("cpu,cpu", 1 << 20), ("cuda:all", 1 << 21)])
def test_a_request_is_as_long_as_the_device_takes_it(device: str, most: int) -> None:
    assert Settings.load(device=device, max_request_tokens=most).max_request_tokens == most
    for queued in (None, most):
        with pytest.raises(ConfigError, match="^settings: max_request_tokens"):
            Settings.load(device=device, max_request_tokens=most + 1, max_queued_tokens=queued)


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigError, match="prot"):
        Settings.load(config_file=file)


def test_by_default_it_serves_the_shipped_checkpoint_to_this_machine_alone() -> None:
    settings = Settings.load()
    assert settings.host == "127.0.0.1"
    assert settings.checkpoint == ROOT / "checkpoints" / "mnemosyne-1" or settings.checkpoint.is_dir()


def test_the_documentation_names_every_variable_and_no_other() -> None:
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"^\| `{ENV_PREFIX}(\w+)`", text, re.MULTILINE))
    assert named == {name.upper() for name in Settings.model_fields}
