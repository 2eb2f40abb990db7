"""From a training run to the checkpoint folder that is served: weights, configuration, prompt, tokenizer.
Knows no training loop and no server.

Matrices are stored in bf16, but for those where a rounding would move a gate that is just closed.

    python -m mnemosyne.training.export --run build/run --out checkpoints/mnemosyne-1 --promise 32
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.model import Titans
from mnemosyne.training import shards
from mnemosyne.training.facts import PROMPT

EXACT = ("gate_weight", "conv")
"""Endings of the names of matrices that stay fp32."""


def export(run: Path, out: Path, promise: int) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``prompt.json`` beside the folder's
    ``tokenizer.json``.

    ``promise`` is how many of the demo's 40 questions the checkpoint answers at the least. Raises
    FileNotFoundError where the run or the tokenizer is missing.
    """
    if not (out / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{out / 'tokenizer.json'} isn't there: a model is served with its tokenizer")
    config = ModelConfig.from_dict(json.loads((run / "run.json").read_text(encoding="utf-8"))["model"])
    model = Titans(config)
    shards.load(run, model)
    tensors = {
        name: p.detach().to(torch.float32 if p.ndim != 2 or name.endswith(EXACT) else torch.bfloat16)
        for name, p in model.named_parameters()
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(config.to_json(), encoding="utf-8")
    prompt = PROMPT | {"promise": {"demo_right": promise}}
    (out / "prompt.json").write_text(json.dumps(prompt, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint folder of a training run.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/mnemosyne-1"))
    parser.add_argument(
        "--promise", type=int, required=True, help="right answers of 40 that the demo promises"
    )
    args = parser.parse_args()
    export(args.run, args.out, args.promise)


if __name__ == "__main__":
    main()
