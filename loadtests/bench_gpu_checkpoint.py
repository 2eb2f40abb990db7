"""A checkpoint's folder of a preset with random weights, for benches that start a server. Knows no device's
speed.

The tokenizer is the shipped one, with entries that no text becomes until the vocabulary has the preset's
size: so text turns into ids as ever, and logits are as many as they are to be.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from bench_presets import TRIAL, config_of

from mnemosyne.checkpoints.weights import Checkpoint, load_checkpoint, save_checkpoint, shipped
from mnemosyne.engine.config import Variant
from mnemosyne.engine.model import Titans


def random_checkpoint(folder: Path, name: str, variant: Variant, device: torch.device) -> Checkpoint:
    """``folder`` is made; weights are drawn on ``device``, the same ones each time. Raises ConfigError."""
    source = load_checkpoint(shipped())
    config = config_of(name, variant)
    if name == TRIAL:
        config = replace(config, vocab_size=source.config.vocab_size)
    tokenizer = _widened(source.tokenizer_path.read_text(encoding="utf-8"), config.vocab_size)
    torch.manual_seed(0)
    with torch.device(device):
        weights = Titans(config).state_dict()
    return save_checkpoint(folder, config, weights, tokenizer, source.prompt)


def _widened(tokenizer_json: str, size: int) -> str:
    tokenizer = json.loads(tokenizer_json)
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), size)}
    return json.dumps(tokenizer, ensure_ascii=False)
