"""The settings of a training run: names, defaults, and the command line made of them. Knows no tensor."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mnemosyne.engine.config import MemoryConfig, ModelConfig, Variant
from mnemosyne.training.babilong.tasks import parse_numbers

OPTIONAL = {"float | None": float, "Path | None": Path}
"""What makes a value of an option that may be left out, by its annotation."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``docs/checkpoint.md`` has the shipped checkpoint's. Durations in minutes, lengths in tokens."""

    minutes: float = 8.0
    """Wall clock, the end of which the learning rate's decay aims at."""
    data: Path = Path("build/training-data")
    tokenizer: Path = Path("checkpoints/mnemosyne-1/tokenizer.json")
    babi: Path | None = None
    """Folder of bAbI's files, whose stories the rows tell (``babilong.story_rows``); None: invented facts."""
    tasks: str = "1-10"
    """Of bAbI, by number. All are asked about equally often, one that is named again after a plus twice as
    often: ``1-10+2,4``."""
    invented: float = 0.25
    """Share of rows that tell invented facts where the others tell bAbI's stories."""
    out: Path = Path("build/run")
    resume: Path | None = None
    """Folder of an earlier run to go on from."""
    seed: int = 0
    bf16: bool = False
    """Dense products in bf16 on a CPU too; on a GPU they always are."""
    workers: int = 12
    step_tokens: int = 65_536
    lengths: str = "512:15,1024:60,2048:240,4096:1e9"
    """Row length and the noise up to which it is used, rising."""
    noise: float | None = None
    """Background tokens per fact at the start; None: as many as where a resumed run ended, or 0."""
    noise_max: float = 800.0
    history: float = 0.0
    """Share of rows whose session has read background before them, and nothing else (``history``)."""
    history_tokens: int = 1_000_000
    """How much of it, on average."""
    promote: float = 0.9
    """Accuracy on far answers at which noise rises."""
    lr: float = 2e-3
    warmup: int = 200
    """Steps."""
    decay: float = 0.35
    """Last share of the time, in which the learning rate falls to a hundredth."""
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    text_weight: float = 0.15
    """Weight of the loss on running text beside the answers'."""
    penalty: float = 0.1
    """Weight of what is written and forgotten outside facts."""
    teach: float = 1.0
    """Weight of the lesson that a fact's value is to be written: without it gates close before any use."""
    free: str = "first"
    """Which of several layers pays nothing for writing, so that its memory learns of running text: first,
    last or none (``step.lessons``). From scratch recall comes soonest with none; with the last the first is
    shut, and nothing that is learned of running text moves the keys that facts were written under."""
    save_every: float = 2.0
    """Minutes."""
    layers: int = 3
    dim: int = 256
    vocabulary: int = 6144
    chunk: int = 64
    window: int = 128
    """Tokens that attention sees; for a MAC the segment."""
    persistent: int = 8
    ffn_dim: int = 0
    """0: 8/3 dim."""
    variant: str = "mag"
    rule: str = "titans"
    options: str = ""
    """Of the rule, such as ``p=3,q=4``."""
    depth: int = 2
    expansion: int = 4
    residual: bool = True
    norm: bool = True
    theta_max: float = 0.1
    clip: float = 1.0
    """Of a token's inner gradient; 0: off."""

    def __post_init__(self) -> None:
        if self.free not in ("first", "last", "none"):
            raise ValueError(f"free must be first, last or none, got {self.free!r}")
        if self.free == "last" and self.layers < 3:
            raise ValueError("with the last layer free the first is shut: it takes a third to write facts")
        _ = self.told  # it raises here what workers would raise unheard
        longest = max(length for length, _ in self.stages)
        if longest <= self.reach:
            raise ValueError(
                f"attention alone reaches {self.reach} tokens back (a {self.variant} of {self.layers} "
                f"layers, windows of {self.window}): rows of {longest} would ask nothing of the memory"
            )

    @property
    def model(self) -> ModelConfig:
        options = dict(option.split("=") for option in self.options.split(",") if option)
        memory = MemoryConfig(
            rule=self.rule,
            options={name: float(value) for name, value in options.items()},
            depth=self.depth,
            expansion=self.expansion,
            residual=self.residual,
            norm=self.norm,
            theta_max=self.theta_max,
            clip=self.clip or None,
        )
        return ModelConfig(
            variant=cast(Variant, self.variant),
            layers=self.layers,
            dim=self.dim,
            vocab_size=self.vocabulary,
            chunk=self.chunk,
            segment=self.window,
            window=self.window,
            persistent=self.persistent,
            ffn_dim=self.ffn_dim or None,
            memory=memory,
        )

    @property
    def stages(self) -> list[tuple[int, float]]:
        """(row length, noise up to which it is used)."""
        return [(int(a), float(b)) for a, b in (stage.split(":") for stage in self.lengths.split(","))]

    @property
    def told(self) -> list[int]:
        """Numbers of bAbI's tasks, some perhaps several times. Raises ConfigError for what is none."""
        return [number for part in self.tasks.split("+") for number in parse_numbers(part)]

    @property
    def reach(self) -> int:
        """Tokens that attention alone can carry something: windows of layers add up, a MAC's segments end
        together in every layer, an LMM has no attention."""
        return {"mac": 1, "lmm": 0}.get(self.variant, self.layers) * self.window


def parse(arguments: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        description="Train a small Titans model that remembers facts over long texts."
    )
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
        elif field.default is None:
            parser.add_argument(name, type=OPTIONAL[str(field.type)])
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)
    return Settings(**vars(parser.parse_args(arguments)))
