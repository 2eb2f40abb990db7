"""Loss on books by how much was read before, with the memory as it is and with the memory reset at every
segment. Owns the measurement and its numbers; prints nothing. Both read the same tokens, so what differs is
the memory alone: attention's window and the short convolution are left as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mnemosyne.checkpoints.weights import load_checkpoint
from mnemosyne.engine import numerics
from mnemosyne.engine.errors import ConfigError, NotFinite
from mnemosyne.engine.model import Titans
from mnemosyne.training.books import Book
from mnemosyne.training.evaluate import forget
from mnemosyne.training.experiments.report import Line, Panel, Result, Table
from mnemosyne.training.lengths import length_name

FIRST = 2000
"""Tokens of the first part of the curve; each further one reaches twice as far."""
LONGEST = 1_000_000
"""Tokens of a stream where no length is asked for."""
Z = 1.959964


@dataclass(frozen=True)
class Subject:
    """A checkpoint, ready to be measured."""

    name: str
    model: Titans
    tokenizer: Tokenizer

    @property
    def facts(self) -> dict[str, Any]:
        c = self.model.config
        kind = {"variant": c.variant, "rule": c.memory.rule, "depth": c.memory.depth, "layers": c.layers}
        return {"checkpoint": self.name, **kind, "segment": c.segment}


def load_subject(folder: Path, device: str) -> Subject:
    """Raises ConfigError for a folder or device that can't be used, and where tokenizer and model don't
    belong together."""
    found = load_checkpoint(folder)
    place = numerics.pick_device(device)
    model = Titans(found.config)
    model.load_state_dict(found.tensors(model.state_dict()))
    compute = numerics.choose(place, "float32" if place.type == "cpu" else "auto")
    model.to(place).prepare(compute)
    return Subject(folder.resolve().name, model, Tokenizer.from_file(str(found.tokenizer_path)))


@dataclass(frozen=True)
class Streams:
    """Stretches of the books that don't overlap."""

    tokens: NDArray[np.int64]
    """`[streams, segments segment + 1]`."""
    bytes_per_token: float
    """Of all the books."""


def cut(books: Sequence[Book], subject: Subject, length: int | None, count: int) -> Streams:
    """Up to ``count`` streams of ``length`` tokens, in whole segments; None: what is there, up to
    ``LONGEST``.

    Raises ConfigError where the books have fewer tokens.
    """
    lines = [line for book in books for line in f"{book.text.rstrip()}\n".splitlines(keepends=True)]
    encoded = subject.tokenizer.encode_batch(lines, add_special_tokens=False)
    tokens = np.fromiter((i for one in encoded for i in one.ids), np.int64)
    segment = subject.model.config.segment
    asked = min(LONGEST, len(tokens)) if length is None else length
    segments = (asked - 1) // segment
    if len(tokens) < asked or segments < 1:
        raise ConfigError(
            f"the books have {len(tokens)} tokens of {subject.name}'s tokenizer, and "
            f"{max(asked, segment + 1)} are needed: give more text or another --length (a segment of "
            f"{segment} and a token at the least)"
        )
    streams = min(count, len(tokens) // asked)
    starts = [i * (len(tokens) // streams) for i in range(streams)]
    rows = np.stack([tokens[start : start + segments * segment + 1] for start in starts])
    return Streams(rows, sum(len(line.encode()) for line in lines) / len(tokens))


def measure(
    model: Titans, tokens: NDArray[np.int64], on_segment: Callable[[], None] = lambda: None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean nats a token in every segment of ``tokens`` `[S, n segment + 1]`: with the memory on, and with it
    reset; `[S, n]` each.

    Raises NotFinite with the place.
    """
    segment, streams = model.config.segment, len(tokens)
    states = [model.initial_state()] * (2 * streams)
    means = []
    for first in range(0, tokens.shape[1] - 1, segment):
        part = torch.from_numpy(tokens[:, first : first + segment + 1])
        states, losses = model.losses(states, torch.cat([part, part]))
        states = states[:streams] + [forget(model, state) for state in states[streams:]]
        mean = losses.double().mean(1).cpu().numpy()
        if not np.isfinite(mean).all():
            raise NotFinite(f"the loss isn't a finite number in tokens {first} to {first + segment}")
        means.append(mean)
        on_segment()
    on, reset = np.split(np.stack(means, 1), 2)
    return on, reset


def curve(on: NDArray[np.float64], reset: NDArray[np.float64], segment: int) -> list[dict[str, Any]]:
    """By how much was read before: nats a token, and how much lower they are with the memory.

    ``half`` is half the 95 % interval of ``gain`` over segments, taken as independent; None for one segment.
    """
    begins = np.arange(on.shape[1]) * segment
    rows = []
    low, high = 0, FIRST
    while low < on.shape[1] * segment:
        here = (begins >= low) & (begins < high)
        if here.any():
            gains = (reset - on)[:, here].ravel()
            error = float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else None
            rows.append(
                {
                    "from": low,
                    "to": min(high, on.shape[1] * segment),
                    "tokens": len(gains) * segment,
                    "on": float(on[:, here].mean()),
                    "reset": float(reset[:, here].mean()),
                    "gain": float(gains.mean()),
                    "half": None if error is None else Z * error,
                }
            )
        low, high = high, 2 * high
    return rows


def entry(subject: Subject, streams: Streams, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A checkpoint's part of the results."""
    count, width = streams.tokens.shape
    read = {"streams": count, "length": width - 1, "bytes_per_token": streams.bytes_per_token}
    return {**subject.facts, **read, "curve": list(rows)}


def table(found: Mapping[str, Any]) -> Table:
    """One checkpoint's curve. ``memory`` says what it does where the interval of the gain leaves zero out."""
    rows = [
        [
            f"{length_name(row['from'])} to {length_name(row['to'])}",
            f"{row['tokens']:,}",
            f"{row['on']:.3f}",
            f"{row['reset']:.3f}",
            f"{row['gain']:+.4f}" + ("" if row["half"] is None else f" ± {row['half']:.4f}"),
            f"{row['on'] / math.log(2) / found['bytes_per_token']:.3f}",
            _verdict(row),
        ]
        for row in found["curve"]
    ]
    kind = f"{found['variant']}, {found['rule']}, depth {found['depth']}"
    title = f"{found['checkpoint']} ({kind}): nats a token; reset at every {found['segment']} tokens"
    columns = ["read before", "tokens", "on", "reset", "gain", "bits/byte", "memory"]
    return Table(title=title, columns=columns, rows=rows)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["half"] is None or abs(row["gain"]) <= row["half"]:
        return ""
    return "helps" if row["gain"] > 0 else "hurts"


def figure(found: Sequence[Mapping[str, Any]]) -> Result:
    """What ``experiments.figures`` draws: both losses, and the gain, by how much was read before."""
    losses, gains = [], []
    for one in found:
        x = [row["to"] for row in one["curve"]]
        for name, label in (("on", "memory on"), ("reset", "memory reset")):
            losses.append(Line(label=f"{one['checkpoint']}, {label}", x=x, y=[r[name] for r in one["curve"]]))
        half = [row["half"] or 0.0 for row in one["curve"]]
        gains.append(Line(label=one["checkpoint"], x=x, y=[r["gain"] for r in one["curve"]], half=half))
    axis = "tokens read, up to"
    panels = [
        Panel(title="loss", x=axis, y="nats a token", lines=losses, logarithmic="x"),
        Panel(title="what the memory gains", x=axis, y="nats a token", lines=gains, logarithmic="x"),
    ]
    return Result(name="perplexity", size="", setting={}, machine="", tables=[], panels=panels)
