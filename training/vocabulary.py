"""Another tokenizer for a trained model: its embedding by the new vocabulary, everything else as it was.

A token that both vocabularies have keeps its row. Another begins as the mean of the rows of the tokens that
its text takes in the old one, as long as an average row. Training goes on from there, and needs a fraction of
the steps: what the blocks know doesn't depend on which pieces words are cut into. Knows no training loop.

    python -m mnemosyne.training.vocabulary --checkpoint OLD --tokenizer NEW/tokenizer.json --out build/moved
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from mnemosyne.training import shards

EMBEDDING = "embedding"


def moved(embedding: Tensor, old: Tokenizer, new: Tokenizer) -> Tensor:
    """``embedding`` `[old tokens, dim]` for the tokens of ``new``, fp32 `[new tokens, dim]`.

    Raises ValueError where it isn't ``old``'s."""
    if len(embedding) != old.get_vocab_size():
        raise ValueError(
            f"the embedding has {len(embedding)} rows and its tokenizer {old.get_vocab_size()} tokens"
        )
    rows = embedding.float()
    length = rows.norm(dim=1).mean()
    made = torch.empty(new.get_vocab_size(), rows.shape[1])
    for text, token in new.get_vocab().items():
        same = old.token_to_id(text)
        if same is not None:
            made[token] = rows[same]
            continue
        pieces = old.encode(new.decode([token], skip_special_tokens=False), add_special_tokens=False).ids
        mean = rows[pieces].mean(0)
        made[token] = mean * (length / mean.norm())
    return made


def move(checkpoint: Path, tokenizer: Path, out: Path) -> None:
    """Write to ``out`` what a run resumes from: the checkpoint's weights with the other embedding."""
    old, new = Tokenizer.from_file(str(checkpoint / "tokenizer.json")), Tokenizer.from_file(str(tokenizer))
    tensors = {name: tensor.float() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    tensors[EMBEDDING] = moved(tensors[EMBEDDING], old, new)
    shards.save_weights(out, tensors, {"step": 0, "noise": 0.0})


def main() -> None:
    parser = argparse.ArgumentParser(description="Give a checkpoint another tokenizer, to train it on.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with the trained model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the other tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for --resume")
    args = parser.parse_args()
    move(args.checkpoint, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
