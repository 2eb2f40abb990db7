"""What a training step costs on a GPU: with the kernels of training, and with the loop over chunks beside it.

    .venv/bin/python loadtests/bench_training.py

A small model with a linear memory, such as ``docs/checkpoint.md`` trains; random tokens. First every gradient
of the loss is compared between the two, in float32; then a step is timed as a run takes it, from arrays on
the host to changed weights. Operations are counted by ``operations``; the share is of a square product's rate
in bf16, measured in the same run. The last line of the output is JSON; exit status 1 where gradients differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_gpu_card import Card, commit_of, version
from bench_gpu_report import Line, failed, table_of
from bench_report import CheckFailed
from rich.console import Console

from mnemosyne.engine.model import Titans
from mnemosyne.kernels import attention, chunk, fusion, gates
from mnemosyne.training.feed import Arrays
from mnemosyne.training.settings import Settings
from mnemosyne.training.step import Step

STEP_TOKENS, LENGTHS = 65_536, (1024, 4096)
CHECKED = 4096
"""Tokens whose gradients are compared."""
BOUND = 1e-3
"""Largest difference of a gradient from the loop's, in norms: what float32 sums in two orders may have."""
ANSWERS = 24
"""Of a row, at most, as rows have them."""
TIMES = 10

console = Console(soft_wrap=True, width=160)


def settings(layers: int, dim: int, length: int) -> Settings:
    return Settings(
        layers=layers,
        dim=dim,
        window=64,
        depth=1,
        norm=False,
        clip=16.0,
        theta_max=0.5,
        lengths=f"{length}:1e9",
    )


@contextlib.contextmanager
def looped() -> Iterator[None]:
    """Without the kernels of training."""
    with contextlib.ExitStack() as stack:
        for module, name in (
            (chunk, "_trains_on_device"),
            (gates, "_trains_on_device"),
            (attention, "_trains_on_device"),
            (fusion, "fuses"),
        ):
            stack.enter_context(mock.patch.object(module, name, lambda *_: False))
        yield


def batch_of(rows: int, length: int, vocabulary: int) -> Arrays:
    """Random tokens with masks of the usual shapes."""
    rng = np.random.default_rng(0)
    targets = ANSWERS + length // 8
    answer = np.zeros((rows, targets), np.float32)
    answer[:, :ANSWERS] = 1

    def numbers(high: int, *shape: int) -> Any:
        return rng.integers(0, high, shape)

    return Arrays(
        tokens=numbers(vocabulary, rows, length).astype(np.uint16),
        fact=numbers(3, rows, length).astype(np.uint8),
        at=numbers(length, rows, targets),
        target=numbers(vocabulary, rows, targets),
        answer=answer,
        text=1 - answer,
        distance=numbers(length, rows, targets).astype(np.int32),
        task=numbers(11, rows, targets).astype(np.uint8),
    )


def make(card: Card, settings: Settings, compute: torch.dtype) -> Titans:
    """Whose gates differ from token to token, as they do once something was learned."""
    torch.manual_seed(0)
    model = Titans(settings.model).to(card.device)
    model.set_compute(compute)
    for block in model.blocks:
        block.mixer.memory.gate_weight.data *= 8
    return model


def gradients(card: Card, settings: Settings, batch: Arrays) -> dict[str, torch.Tensor]:
    model = make(card, settings, torch.float32)
    whole = batch._replace(tokens=batch.tokens.astype(int))
    loss, _ = Step(model, settings).losses(*(torch.from_numpy(x).to(card.device) for x in whole))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(card: Card, settings: Settings, length: int) -> float:
    """The largest difference between the two. Raises CheckFailed, also where no kernel ran."""
    torch.backends.cuda.matmul.allow_tf32 = False
    batch = batch_of(max(1, CHECKED // length), length, settings.vocabulary)
    got = gradients(card, settings, batch)
    with looped():
        want = gradients(card, settings, batch)
    torch.backends.cuda.matmul.allow_tf32 = True
    if got.keys() != want.keys():
        raise CheckFailed(f"gradients of other parameters: {sorted(got.keys() ^ want.keys())}")
    found = {name: float((got[name] - g).norm() / g.norm().clamp(min=1e-20)) for name, g in want.items()}
    worst = max(found, key=lambda name: found[name])
    if found[worst] == 0 and not card.trial:
        raise CheckFailed("every gradient has the loop's bits: the kernels of training don't run here")
    if not found[worst] <= BOUND:
        raise CheckFailed(f"the gradient of {worst} is off by {found[worst]:.1e}")
    return found[worst]


def operations(model: Titans, length: int) -> float:
    """Of a token: 6 a parameter of a dense product, the head's where logits are asked for; three times the
    memory's products forward (scan 3 x 2 D^2, read 2 x 2 D^2 + 2 x 2 L D, a head) and attention's."""
    c = model.config
    dense = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "embedding")
    head = model.embedding.numel() * (ANSWERS + length // 8) / length
    D, L = c.head_dim, c.chunk
    memory = 10 * D * D + 4 * L * D
    attended = 4 * (c.window + L + c.persistent) * D
    return 6 * (dense + head) + 3 * c.heads * c.layers * (memory + attended)


def measure(card: Card, settings: Settings, tokens: int, length: int, what: str, gemm: float) -> list[Line]:
    model = make(card, settings, card.compute)
    step, batch = Step(model, settings), batch_of(tokens // length, length, settings.vocabulary)

    def steps(count: int) -> None:
        for _ in range(count):
            step(batch, 1e-4)

    steps(2)
    spent = card.seconds(partial(steps, TIMES)) / TIMES
    loss = step.read()["loss"]
    if not np.isfinite(loss):
        raise CheckFailed(f"{what}: the loss isn't finite")
    counted = operations(model, length) * tokens / spent
    name = f"rows of {length:,}, {what}"
    return [
        Line(f"{name}: ms a step of {tokens:,} tokens", spent * 1e3, "{:,.1f}"),
        Line(f"{name}: tokens/s", tokens / spent),
        Line(f"{name}: TFLOP/s", counted / 1e12, "{:,.1f}", limit=gemm / 1e12, limit_is="a square product"),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial at toy size")
    parser.add_argument("--commit", help="what to call the code where git can't tell")
    options = parser.parse_args(arguments)
    card = Card(options.device)
    layers, dim, tokens, lengths = (2, 64, 512, (256,)) if card.trial else (5, 256, STEP_TOKENS, LENGTHS)
    rates = card.rates()
    facts = {
        "card": card.name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "gemm_flops": rates.gemm,
    }
    facts["commit"] = options.commit or commit_of(Path(__file__).resolve().parent)
    lines: list[Line] = []
    correct = True
    for length in lengths:
        chosen = settings(layers, dim, length)
        try:
            worst = check(card, chosen, length)
            console.print(f"rows of {length:,}: gradients within {worst:.1e} of the loop's", highlight=False)
            lines += measure(card, chosen, tokens, length, "kernels", rates.gemm)
            with looped():
                lines += measure(card, chosen, tokens, length, "loop", rates.gemm)
        except CheckFailed as error:
            lines.append(failed(f"rows of {length:,}", error))
            correct = False
        card.clean()
    title = (
        "TRIAL on a CPU at toy size: these times say nothing of a GPU" if card.trial else "A training step"
    )
    console.print(table_of(f"{title}; {facts['card']}, torch {facts['torch']}", lines))
    print(json.dumps({"correct": correct, **facts, "lines": [line.facts() for line in lines]}), flush=True)
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
