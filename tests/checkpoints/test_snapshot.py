"""A state as a file: the same bytes for the same state, and nothing but what was written is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mnemosyne.checkpoints import format
from mnemosyne.checkpoints.snapshot import dump_state, load_state
from mnemosyne.engine.config import MemoryConfig, ModelConfig
from mnemosyne.engine.errors import (
    NotFinite,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotUnsupported,
    StateIncompatible,
)
from mnemosyne.engine.gpu.blob import gpu_layout
from mnemosyne.engine.pyramid import FIELDS, Pyramid
from mnemosyne.engine.state import SessionState, state_layout
from mnemosyne.kernels.rules.registry import RULES

DATA = Path(__file__).parent / "data"
MODEL = "ab" * 32
NUMERICS = {"device": "cpu", "dtype": "float32", "torch": "2.13"}
VARIANTS = ["mac", "mag", "mal", "lmm"]
PYRAMID = Pyramid.blank(1).extended(np.arange(12, dtype=np.float32).reshape(3, 1, 4) / 8)


def tiny(variant: Any = "mac") -> ModelConfig:
    sizes = {"layers": 1, "dim": 4, "head_dim": 2, "vocab_size": 300, "chunk": 2, "segment": 2, "window": 2}
    return ModelConfig(variant=variant, conv=2, memory=MemoryConfig(depth=2, expansion=1), **sizes)  # type: ignore[arg-type]


def state_of(config: ModelConfig, dtype: torch.dtype) -> SessionState:
    """Numbers that a formula gives, exact in every dtype."""
    tensors, start = {}, 0
    for name, (shape, kind) in sorted(state_layout(config, dtype).items()):
        count = int(torch.tensor(shape).prod())
        values = (torch.arange(start, start + count) * 37 % 255 - 127).to(torch.float32) / 64
        tensors[name] = values.reshape(shape).to(kind)
        start += count
    return SessionState(position=6, tensors=tensors, pending=(299, 0), kinds=b"\0\1", pyramid=PYRAMID)


def dump(state: SessionState, **changes: Any) -> bytes:
    return dump_state(state, **{"model_fingerprint": MODEL, "numerics": NUMERICS, **changes})


def load(data: bytes, config: ModelConfig, dtype: torch.dtype = torch.float32) -> SessionState:
    return load_state(data, config=config, dtype=dtype, model_fingerprint=MODEL)[0]


@pytest.fixture
def data() -> bytes:
    return dump(state_of(tiny(), torch.float32))


@pytest.mark.parametrize("rule", RULES)
def test_the_state_of_every_rule(rule: str) -> None:
    """Round trip to the bit; momentum is there with the rule that has it, and refused with every other."""
    matrix = {"depth": 1, "residual": False, "norm": False} if "delta" in rule else {"depth": 2}
    memory = MemoryConfig(rule=rule, expansion=1, **matrix)  # type: ignore[arg-type]
    config = dataclasses.replace(tiny("mag"), memory=memory)
    state = state_of(config, torch.float32)
    assert any(name.startswith("momentum") for name in state.tensors) == (rule == "titans")
    assert load(dump(state), config).digest() == state.digest()
    added = {**state.tensors, "momentum.0": torch.zeros_like(state.tensors["memory.0"])}
    other = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("momentum")}
    wrong = dataclasses.replace(state, tensors=other if rule == "titans" else added)
    with pytest.raises(SnapshotCorrupt, match="momentum.0"):
        load(dump(wrong), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_to_the_bit(variant: str, dtype: torch.dtype) -> None:
    config = tiny(variant)
    state = state_of(config, dtype)
    data = dump(state, created_at=1_700_000_000)
    again, manifest = load_state(data, config=config, dtype=dtype, model_fingerprint=MODEL)
    assert again.digest() == state.digest()
    assert (again.position, again.pending, again.kinds) == (6, (299, 0), b"\0\1")
    assert manifest.numerics == NUMERICS and manifest.tokens_seen == 8 == again.tokens_seen
    assert manifest.compute_dtype == dtype and manifest.created_at == 1_700_000_000
    assert dump(again, created_at=1_700_000_000) == data


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_a_gpu_to_a_cpu_and_back(variant: str) -> None:
    """The kernels keep momentum in bf16, a CPU in fp32: what it was comes back to the bit."""
    config = tiny(variant)
    layout = gpu_layout(config, torch.bfloat16)
    exact = state_of(config, torch.float32)
    tensors = layout.views(layout.pack(exact.tensors, torch.device("cpu")))
    written = dataclasses.replace(exact, tensors=tensors)
    on_cpu, manifest = load_state(dump(written), config=config, dtype=torch.float32, model_fingerprint=MODEL)
    assert manifest.compute_dtype == torch.bfloat16 and on_cpu.digest() == exact.digest()
    assert all(tensor.dtype == torch.float32 for tensor in on_cpu.tensors.values())
    for data in (dump(written), dump(on_cpu)):
        again = load_state(
            data, config=config, dtype=torch.bfloat16, momentum=torch.bfloat16, model_fingerprint=MODEL
        )[0]
        assert again.digest() == written.digest()
        packed = layout.views(layout.pack(again.tensors, torch.device("cpu")))
        assert dataclasses.replace(again, tensors=packed).digest() == written.digest()


@pytest.mark.parametrize("name", ["momentum.0", "momentum.1"])
def test_momentum_of_one_precision_and_no_other(name: str) -> None:
    state = state_of(tiny(), torch.float32)
    mixed = {**state.tensors, name: state.tensors[name].to(torch.bfloat16)}
    with pytest.raises(SnapshotCorrupt, match=r"momentum\.\d"):
        load(dump(dataclasses.replace(state, tensors=mixed)), tiny())


def test_a_session_that_has_read_nothing() -> None:
    state = state_of(tiny(), torch.float32)
    state = dataclasses.replace(state, position=0, pending=(), kinds=b"", pyramid=Pyramid.blank(1))
    assert load(dump(state), tiny()).digest() == state.digest()


@pytest.mark.parametrize(("variant", "dtype"), [("mac", torch.float32), ("mag", torch.bfloat16)])
def test_the_format_is_these_bytes(variant: str, dtype: torch.dtype) -> None:
    """A change of these files is a change of the format: it needs a new version and a migration."""
    golden = (DATA / f"state-v2-{variant}.safetensors").read_bytes()
    state = state_of(tiny(variant), dtype)
    assert dump(state) == golden
    assert load(golden, tiny(variant), dtype).digest() == state.digest()


@pytest.mark.parametrize(("variant", "dtype"), [("mac", torch.float32), ("mag", torch.bfloat16)])
def test_version_1_loads_and_nothing_is_known_of_what_it_read(variant: str, dtype: torch.dtype) -> None:
    golden = (DATA / f"state-v1-{variant}.safetensors").read_bytes()
    found = load(golden, tiny(variant), dtype)
    expected = dataclasses.replace(state_of(tiny(variant), dtype), pyramid=Pyramid.blank(1, 3))
    assert found.digest() == expected.digest()
    assert list(found.pyramid.cover(0, 3, 0)) == []
    values = np.ones((2, 1, len(FIELDS)), np.float32)
    assert [(p.first, p.last) for p in found.pyramid.extended(values).cover(0, 5, 0)] == [(3, 4), (4, 5)]


def test_a_version_1_file_without_a_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "VERSION", 1)
    old = format.encode({}, {"tails": torch.zeros(1)})
    monkeypatch.undo()
    with pytest.raises(SnapshotCorrupt):
        format.decode(old)


def test_equal_states_are_equal_bytes(data: bytes) -> None:
    state = state_of(tiny(), torch.float32)
    shuffled = {name: state.tensors[name].clone() for name in sorted(state.tensors, reverse=True)}
    numerics = dict(reversed(NUMERICS.items()))
    assert dump(dataclasses.replace(state, tensors=shuffled), numerics=numerics) == data


def test_views_and_strides_are_written_by_value(data: bytes) -> None:
    state = state_of(tiny(), torch.float32)
    strided = {name: torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in state.tensors.items()}
    assert not strided["tails"].is_contiguous()
    assert dump(dataclasses.replace(state, tensors=strided)) == data


def test_the_safetensors_library_reads_it(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(data)
    state = state_of(tiny(), torch.float32)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "mnemosyne.state"
        assert file.metadata()["format_version"] == "2"
        assert set(file.keys()) == {*state.tensors, "pyramid"}
        for name, tensor in state.tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_every_cut_is_refused(data: bytes) -> None:
    for length in [*range(0, 2048, 7), *range(2048, len(data), 701), len(data) - 1]:
        with pytest.raises(SnapshotCorrupt):
            load(data[:length], tiny())
    with pytest.raises(SnapshotCorrupt):
        load(data + b"\0", tiny())


def test_every_flipped_bit_is_refused(data: bytes) -> None:
    header = 8 + int.from_bytes(data[:8], "little")
    for i in [*range(header), *range(header, len(data), 41)]:
        flipped = bytearray(data)
        flipped[i] ^= 1 << i % 8
        with pytest.raises(
            (SnapshotCorrupt, SnapshotUnsupported)
        ):  # the latter where it hits the version's digit
            load(bytes(flipped), tiny())


def test_bytes_that_were_never_a_state_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    junk = [b"", b"\0" * 8, b"\xff" * 100, os.urandom(1000), b"PK\3\4" + bytes(100)]
    junk.append((10**9).to_bytes(8, "little") + bytes(1000))
    header = b"[" * 100_000
    junk.append(len(header).to_bytes(8, "little") + header)
    junk.append(save({"x": torch.zeros(3)}))
    junk.append(save({"x": torch.zeros(3)}, metadata={"format": "pt"}))
    for data in junk:
        with pytest.raises(SnapshotCorrupt):
            load(data, tiny())


def test_a_header_in_another_form_is_refused(data: bytes) -> None:
    """The same values in another order or spacing: no byte of a file is free to change."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    shuffled = {name: header[name] for name in reversed(header)}
    for text in (json.dumps(shuffled, separators=(",", ":")), json.dumps(header, sort_keys=True)):
        other = text.encode() + b" " * (-len(text) % 8)
        with pytest.raises(SnapshotCorrupt):
            load(len(other).to_bytes(8, "little") + other + data[end:], tiny())


def forged(data: bytes, **changes: str) -> bytes:
    """A whole file with other metadata and a right checksum: what a bug or a stranger might write."""
    metadata, tensors = format.decode(data)
    return format.encode({**metadata, **changes}, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "5"},
        {"position": "-2"},
        {"position": "x"},
        {"pending": "[]", "kinds": ""},
        {"pending": "[1,2,3]", "kinds": "000000"},
        {"pending": "[1,300]"},
        {"pending": "[1,-1]"},
        {"pending": "[1,true]"},
        {"pending": "[1,2.0]"},
        {"pending": "7"},
        {"kinds": "00"},
        {"kinds": "0002"},
        {"kinds": "zz"},
        {"numerics": "{"},
        {"created_at": "now"},
    ],
)
def test_tokens_that_no_session_can_have_are_refused(data: bytes, changes: dict[str, str]) -> None:
    with pytest.raises(SnapshotCorrupt):
        load(forged(data, **changes), tiny())


def other_tensors() -> Iterator[dict[str, torch.Tensor]]:
    state = state_of(tiny(), torch.float32)
    levels = torch.from_numpy(state.pyramid.array())
    whole = {**state.tensors, "pyramid": levels}
    yield dict(state.tensors)
    yield {**whole, "pyramid": levels[1:]}
    yield {**whole, "pyramid": levels.double()}
    yield {**whole, "pyramid": -levels}
    yield {name: tensor for name, tensor in whole.items() if name != "memory.1"}
    yield {name: tensor for name, tensor in whole.items() if name != "tails"}
    yield {**whole, "extra": torch.zeros(1)}
    yield {**whole, "memory.0": whole["memory.0"][..., :1]}
    yield {**whole, "memory.0": whole["memory.0"].to(torch.bfloat16)}
    yield {**whole, "keys": whole["keys"].to(torch.bfloat16)}
    yield {**whole, "tails": whole["tails"].to(torch.float64)}
    for bad in (float("nan"), float("inf")):
        yield {**whole, "momentum.0": torch.full_like(whole["momentum.0"], bad)}


@pytest.mark.parametrize("tensors", list(other_tensors()))
def test_another_layout_or_a_number_that_is_not_finite_is_refused(
    data: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(SnapshotCorrupt):
        load(format.encode(format.decode(data)[0], tensors), tiny())


def test_a_state_that_is_not_finite_is_not_written() -> None:
    state = state_of(tiny(), torch.float32)
    state.tensors["memory.0"].view(-1)[3] = float("nan")
    with pytest.raises(NotFinite, match="memory.0"):
        dump(state)


def test_a_state_of_other_weights_is_refused_by_name(data: bytes) -> None:
    other = "cd" * 32
    for config in (tiny(), tiny("mag")):
        with pytest.raises(StateIncompatible) as caught:
            load_state(data, config=config, dtype=torch.float32, model_fingerprint=other)
        assert MODEL in caught.value.message and other in caught.value.message
        assert caught.value.attributes == {"state_model": MODEL, "model": other}


@pytest.mark.parametrize("version", ["3", "10", "999999999999"])
def test_a_later_format_is_refused_by_name(
    data: bytes, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format, "VERSION", int(version))
    monkeypatch.setattr(format, "MIGRATIONS", {n: (lambda m, t: (m, t)) for n in range(1, 10)})
    if int(version) > 10:
        later = data.replace(
            b'"format_version":"2"', b'"format_version":"9"'
        )  # no checksum of ours can be right
    else:
        later = format.encode({}, {"a tensor we don't know": torch.zeros(2)})
    monkeypatch.undo()
    with pytest.raises(SnapshotUnsupported) as caught:
        load(later, tiny())
    assert caught.value.attributes["newest"] == 2


def test_an_older_format_goes_through_its_migration(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were this version 3: version 2 is migrated, and refused by name once its migration is gone."""
    monkeypatch.setattr(format, "VERSION", 3)
    monkeypatch.setattr(format, "MIGRATIONS", {2: lambda m, t: ({**m, "position": "8"}, t)})
    assert load(data, tiny()).position == 8
    monkeypatch.setattr(format, "MIGRATIONS", {})
    with pytest.raises(SnapshotUnsupported, match="format 2"):
        load(data, tiny())


@pytest.mark.parametrize("version", ["0", "-1", "", "1.0", "one", "١"])
def test_a_version_that_never_was_is_refused(data: bytes, version: str) -> None:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header["__metadata__"]["format_version"] = version
    text = json.dumps(header).encode()
    with pytest.raises(SnapshotError):
        load(len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :], tiny())


def test_other_numerics_load_and_are_said() -> None:
    state = state_of(tiny("mag"), torch.bfloat16)
    data = dump(state, numerics={"device": "cuda"})
    again, manifest = load_state(data, config=tiny("mag"), dtype=torch.float32, model_fingerprint=MODEL)
    assert manifest.numerics == {"device": "cuda"} and manifest.compute_dtype == torch.bfloat16
    assert {t.dtype for t in again.tensors.values()} == {torch.float32}
    for name, tensor in state.tensors.items():
        assert torch.equal(again.tensors[name], tensor.float())
