"""Another tokenizer for a trained model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from mnemosyne.engine.model import Titans
from mnemosyne.training import export, shards
from mnemosyne.training.settings import Settings
from mnemosyne.training.step import Step
from mnemosyne.training.tokenizer import train as train_tokenizer
from mnemosyne.training.train import build
from mnemosyne.training.vocabulary import EMBEDDING, move, moved

TEXT = "The quick zyzzyva jumps over the lazy zyzzyva, and the zyzzyva sleeps.\n"


@pytest.fixture(scope="module")
def other() -> Tokenizer:
    """Has a word whole that the shipped tokenizer cuts up."""
    made = train_tokenizer([TEXT * 50], vocabulary=300, sentences=0)
    assert made.token_to_id("Ġzyzzyva") is not None
    return made


def test_tokens_of_both_keep_their_rows_and_others_are_the_mean_of_their_pieces(
    tokenizer: Tokenizer, other: Tokenizer
) -> None:
    rows = torch.randn(tokenizer.get_vocab_size(), 16, generator=torch.Generator().manual_seed(1))
    made = moved(rows, tokenizer, other)
    assert made.shape == (other.get_vocab_size(), 16)
    shared = [token for token in other.get_vocab() if tokenizer.token_to_id(token) is not None]
    assert len(shared) > 250
    for token in shared:
        assert torch.equal(made[other.token_to_id(token)], rows[tokenizer.token_to_id(token)])
    pieces = tokenizer.encode(" zyzzyva").ids
    assert len(pieces) > 1
    own, mean = made[other.token_to_id("Ġzyzzyva")], rows[pieces].mean(0)
    torch.testing.assert_close(own / own.norm(), mean / mean.norm())
    torch.testing.assert_close(own.norm(), rows.norm(dim=1).mean())


def test_a_checkpoint_with_another_tokenizer_is_trained_on(
    settings: Settings, other: Tokenizer, tmp_path: Path
) -> None:
    step = Step(build(settings), settings)
    shards.save(tmp_path / "run", step.model, step.optimizer, {"model": dataclasses.asdict(settings.model)})
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "tokenizer.json").write_bytes(settings.tokenizer.read_bytes())
    export.export(tmp_path / "run", checkpoint, 0)
    other.save(str(tmp_path / "other.json"))
    move(checkpoint, tmp_path / "other.json", tmp_path / "moved")
    model = Titans(dataclasses.replace(settings.model, vocab_size=other.get_vocab_size()))
    assert shards.load(tmp_path / "moved", model) == {"step": 0, "noise": 0.0}
    before = load_file(checkpoint / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert name == EMBEDDING or torch.equal(parameter.detach(), before[name].float()), name
    assert json.loads((tmp_path / "moved" / "run.json").read_text())["step"] == 0


def test_an_embedding_of_another_tokenizer_is_refused(tokenizer: Tokenizer, other: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"has 300 rows and its tokenizer {tokenizer.get_vocab_size()}"):
        moved(torch.zeros(300, 4), tokenizer, other)
