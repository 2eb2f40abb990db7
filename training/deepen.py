"""One more layer on top of a trained model, free to learn of running text where the first one was.

What a first layer's memory learns moves the keys of all layers above it, away from those that facts were
written under. So its gates are shut, and its memory stays as it begins, as ``train`` keeps it wherever the
last layer is free. The new layer does nothing yet, for what ends it is 0. Training goes on from there, with
``--layers`` one more, ``--free last`` and the curriculum from its beginning. Knows no training loop.

    python -m mnemosyne.training.deepen --run build/run --out build/deeper
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.model import Titans
from mnemosyne.training import shards

ENDS = {
    "mag": ("norm_attention.weight", "norm_memory.weight"),
    "mac": ("norm_attention.weight", "norm_memory.weight"),
    "mal": ("attention.output.weight",),
    "lmm": ("memory.output.weight",),
}
"""Of a mixer: without these its output is 0."""
SHUT = -8.0
"""A gate's logit, well below where it reaches 0."""


@torch.no_grad()
def shut(model: Titans) -> None:
    """The first layer's memory stays M_0, in training too: a closed gate that can learn opens again."""
    memory = model.blocks[0].mixer.memory
    memory.gate_weight.zero_().requires_grad_(False)
    memory.gate_bias.fill_(SHUT).requires_grad_(False)


@torch.no_grad()
def deeper(model: Titans) -> Titans:
    """The same with one more layer, but that the first one's memory stays M_0."""
    c = model.config
    made = Titans(dataclasses.replace(c, layers=c.layers + 1))
    made.load_state_dict(model.state_dict(), strict=False)
    ends = ("ffn.down.weight", *(f"mixer.{end}" for end in ENDS[c.variant]))
    for name, parameter in made.blocks[c.layers].named_parameters():
        if name.endswith(ends):
            parameter.zero_()
    shut(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a layer on top of a trained model, to train it on.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder for --resume")
    args = parser.parse_args()
    if args.out.resolve() == args.run.resolve():
        parser.error("--out is the run's own folder: its averages would be taken for the deeper model's")
    facts = json.loads((args.run / "run.json").read_text(encoding="utf-8"))
    model = Titans(ModelConfig.from_dict(facts["model"]))
    shards.load(args.run, model)
    shards.save_weights(
        args.out, dict(deeper(model).named_parameters()), {"step": facts["step"], "noise": 0.0}
    )


if __name__ == "__main__":
    main()
