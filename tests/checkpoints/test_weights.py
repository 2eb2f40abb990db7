"""A checkpoint's folder: written, read back, and refused by the name of the file that is at fault."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mnemosyne.checkpoints.weights import FILES, Checkpoint, load_checkpoint, save_checkpoint, shipped
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.errors import ConfigError

PROMPT = {
    "system": "{content}\n",
    "user": "Q: {content}",
    "assistant": " {content}\n",
    "end_of_turn": "\n",
    "stop": ["\n"],
    "note": "ä",
}
CONFIG = ModelConfig(variant="mac", layers=1, dim=4, head_dim=2, vocab_size=3, chunk=2, segment=2, window=2)


def tokenizer_of(size: int) -> str:
    text: str = Tokenizer(WordLevel({str(i): i for i in range(size)}, unk_token="0")).to_str()
    return text


def weights() -> dict[str, torch.Tensor]:
    tied = torch.arange(12.0).reshape(3, 4)
    return {"embedding": tied, "head": tied, "half": tied.to(torch.bfloat16), "turned": tied.T}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return save_checkpoint(folder, CONFIG, weights(), tokenizer_of(3), PROMPT)


def test_what_was_saved_is_loaded(folder: Path, checkpoint: Checkpoint) -> None:
    again = load_checkpoint(folder)
    assert again == checkpoint
    assert again.config == CONFIG and again.prompt == PROMPT
    assert Tokenizer.from_file(str(again.tokenizer_path)).get_vocab_size() == 3
    tensors = again.tensors(weights())
    for name, tensor in weights().items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_the_fingerprint_is_of_the_four_files(folder: Path, checkpoint: Checkpoint) -> None:
    data = b"".join((folder / name).read_bytes() for name in FILES)
    assert checkpoint.fingerprint == hashlib.sha256(data).hexdigest()
    other = save_checkpoint(folder.with_name("same"), CONFIG, weights(), tokenizer_of(3), PROMPT)
    assert other.fingerprint == checkpoint.fingerprint
    (folder / "README.md").write_text("a card")
    assert load_checkpoint(folder).fingerprint == checkpoint.fingerprint
    changed = save_checkpoint(folder, CONFIG, weights(), tokenizer_of(3), {**PROMPT, "end_of_turn": ""})
    assert changed.fingerprint != checkpoint.fingerprint


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_broken_file_is_named(folder: Path, checkpoint: Checkpoint, name: str) -> None:
    (folder / name).write_bytes(b"{\xff")
    with pytest.raises(ConfigError, match=name):
        load_checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load_checkpoint(folder)


def test_weights_cut_short_are_refused(folder: Path, checkpoint: Checkpoint) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_checkpoint(folder)


def test_weights_of_another_configuration_are_refused(folder: Path, checkpoint: Checkpoint) -> None:
    other = dataclasses.replace(CONFIG, layers=2)
    (folder / "config.json").write_text(other.to_json())
    with pytest.raises(ConfigError, match=r"another config\.json"):
        load_checkpoint(folder)
    # Written by other hands, without a word about the configuration: the module's shapes tell.
    save_file({"embedding": torch.zeros(3, 4)}, folder / "model.safetensors")
    assert load_checkpoint(folder).config == other


def test_weights_that_do_not_fit_a_module_are_refused(checkpoint: Checkpoint) -> None:
    like = weights()
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**like, "bias": torch.zeros(1)}, r"missing \['bias'\]"),
        ({name: t for name, t in like.items() if name != "half"}, r"unexpected \['half'\]"),
        ({**like, "head": torch.zeros(3, 5)}, r"head is \(3, 4\), expected \(3, 5\)"),
    ]
    for module, message in wrong:
        with pytest.raises(ConfigError, match=message):
            checkpoint.tensors(module)


def test_a_tokenizer_of_another_size_is_refused(folder: Path, checkpoint: Checkpoint) -> None:
    (folder / "tokenizer.json").write_text(tokenizer_of(4))
    with pytest.raises(ConfigError, match="4 tokens .* vocab_size 3"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        {},
        {**PROMPT, "user": "no place"},
        {**PROMPT, "system": 5},
        {**PROMPT, "end_of_turn": None},
        {**PROMPT, "stop": "x"},
        {**PROMPT, "stop": [""]},
    ],
)
def test_prompts_that_can_not_be_used_are_refused(folder: Path, checkpoint: Checkpoint, prompt: Any) -> None:
    (folder / "prompt.json").write_text(json.dumps(prompt))
    with pytest.raises(ConfigError, match=r"prompt\.json"):
        load_checkpoint(folder)


def test_the_shipped_folder_lies_beside_the_code() -> None:
    assert shipped().name == "mnemosyne-1" and shipped().is_dir()
