"""A checkpoint's folder: configuration, weights, tokenizer and prompts. Knows files, no module and no
session.

    config.json  model.safetensors  tokenizer.json  prompt.json
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.errors import ConfigError

CONFIG, WEIGHTS, TOKENIZER, PROMPT = "config.json", "model.safetensors", "tokenizer.json", "prompt.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER, PROMPT)
_CONFIG_KEY = "config_sha256"
"""Metadata of the weights: which configuration they were saved with."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read and checked, all but the weights' numbers."""

    path: Path
    config: ModelConfig
    fingerprint: str
    """SHA-256 over the bytes of the four files, one after the other in the order above."""
    prompt: dict[str, Any]
    """Chat template and way to ask: ``system``, ``user``, ``assistant``, ``end_of_turn``, ``stop``, ..."""

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    def tensors(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, for a module whose ``state_dict()`` is ``like``.

        Raises ConfigError where they don't fit.
        """
        try:
            tensors = load_file(self.path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"can't read the weights {self.path / WEIGHTS}: {error}") from error
        missing, extra = sorted(set(like) - set(tensors)), sorted(set(tensors) - set(like))
        if missing or extra:
            raise ConfigError(f"{WEIGHTS} doesn't belong to {CONFIG}: missing {missing}, unexpected {extra}")
        for name, tensor in tensors.items():
            if tensor.shape != like[name].shape:
                shapes = f"{name} is {tuple(tensor.shape)}, expected {tuple(like[name].shape)}"
                raise ConfigError(f"{WEIGHTS} doesn't belong to {CONFIG}: {shapes}")
        return tensors


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check a checkpoint's folder.

    Raises ConfigError naming the file that is missing or doesn't belong.
    """
    path = Path(path)
    for name in FILES:
        if not (path / name).is_file():
            raise ConfigError(f"{path} is not a checkpoint: {name} is missing")
    config = ModelConfig.from_file(path / CONFIG)
    _check_weights(path / WEIGHTS, config)
    _check_tokenizer(path / TOKENIZER, config)
    return Checkpoint(path, config, _fingerprint(path), _read_prompt(path / PROMPT))


def save_checkpoint(
    path: Path | str,
    config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer_json: str,
    prompt: Mapping[str, Any],
) -> Checkpoint:
    """Write a checkpoint's folder, each file aside and then renamed; returns it as it is read back.

    Equal arguments give equal bytes, and so an equal fingerprint.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # Copies: tensors that share memory can't be saved side by side.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    contents = {
        CONFIG: config.to_json().encode(),
        WEIGHTS: save(tensors, metadata={_CONFIG_KEY: _config_hash(config)}),
        TOKENIZER: tokenizer_json.encode(),
        PROMPT: (json.dumps(prompt, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(),
    }
    for name, data in contents.items():
        aside = path / f"{name}.{secrets.token_hex(4)}.aside"
        aside.write_bytes(data)
        os.replace(aside, path / name)
    return load_checkpoint(path)


def shipped() -> Path:
    """The checkpoint that comes with Mnemosyne."""
    return Path(__file__).resolve().parent / "mnemosyne-1"


def _config_hash(config: ModelConfig) -> str:
    return hashlib.sha256(config.to_json().encode()).hexdigest()


def _check_weights(path: Path, config: ModelConfig) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            made_with = (file.metadata() or {}).get(_CONFIG_KEY)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"can't read the weights {path}: {error}") from error
    if made_with is not None and made_with != _config_hash(config):
        raise ConfigError(f"{path} was saved with another {CONFIG} than the one beside it")


def _check_tokenizer(path: Path, config: ModelConfig) -> None:
    try:
        size = Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"can't read the tokenizer {path}: {error}") from error
    if size != config.vocab_size:
        raise ConfigError(f"{path} has {size} tokens and {CONFIG} says vocab_size {config.vocab_size}")


def _read_prompt(path: Path) -> dict[str, Any]:
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read the prompts {path}: {error}") from error
    if not isinstance(prompt, dict):
        raise ConfigError(f"{path} must hold an object")
    for role in ("system", "user", "assistant"):
        if not isinstance(prompt.get(role), str) or "{content}" not in prompt[role]:
            raise ConfigError(f"{path}: {role} must be a string with {{content}}")
    if not isinstance(prompt.get("end_of_turn"), str):
        raise ConfigError(f"{path}: end_of_turn must be a string")
    stop = prompt.get("stop")
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"{path}: stop must be a list of strings")
    return prompt


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        with open(path / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
