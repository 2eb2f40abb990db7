"""The base recipe of short runs, and what is changed in it, one thing at a time. Owns the settings of every
run; trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mnemosyne.training.experiments.recipe_run import RunSettings

LONGER = 8
BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Setting:
    text: int
    """Bytes of documentation to learn from, and of other documentation to be judged by."""
    layers: int
    dim: int
    window: int
    chunk: int
    length: int
    noise: float
    """Background tokens per fact."""
    steps: int
    step_tokens: int
    judged: int
    """Rows of the trained length; a quarter as many longer ones."""

    @property
    def far(self) -> int:
        """Tokens beyond which attention reaches in no run: some have windows twice as wide, one has twice as
        many layers."""
        return 2 * self.layers * self.window


SETTINGS = {
    "tiny": Setting(
        text=100_000,
        layers=1,
        dim=64,
        window=16,
        chunk=16,
        length=128,
        noise=2.0,
        steps=3,
        step_tokens=256,
        judged=16,
    ),
    "small": Setting(
        text=300_000,
        layers=1,
        dim=64,
        window=32,
        chunk=32,
        length=256,
        noise=5.0,
        steps=50,
        step_tokens=1024,
        judged=64,
    ),
    "full": Setting(
        text=1_000_000,
        layers=1,
        dim=128,
        window=64,
        chunk=64,
        length=512,
        noise=10.0,
        steps=250,
        step_tokens=2048,
        judged=128,
    ),
}


@dataclass(frozen=True)
class Change:
    name: str
    group: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of ``RunSettings``."""

    def applied(self, s: Setting, vocabulary: int) -> RunSettings:
        """The settings of the run: the base recipe, changed."""
        base: dict[str, Any] = {
            "layers": s.layers,
            "dim": s.dim,
            "vocabulary": vocabulary,
            "window": s.window,
            "chunk": s.chunk,
            "lengths": f"{s.length}:1e9",
            "noise": s.noise,
            "step_tokens": s.step_tokens,
            "warmup": max(1, s.steps // 10),
            "penalty": 0.3,
            "depth": 1,
            "norm": False,
            "theta_max": 0.5,
            "clip": 16.0,
        }
        return RunSettings(**(base | dict(self.settings)))


def changes(s: Setting) -> list[Change]:
    """The base recipe under four seeds, and what differs from it in one thing. Where a thing can't be had
    alone, what it needs is a change of its own, named in brackets; only Memora's theta, which is of another
    kind than the others', isn't."""
    wide = {"window": 2 * s.window}
    return [
        *(Change(BASE if not i else f"{BASE}, seed {i}", BASE, {"seed": i} if i else {}) for i in range(4)),
        Change("LMM", "block form", {"variant": "lmm"}),
        Change("MAL", "block form", {"variant": "mal"}),
        Change("MAC", "block form", {"variant": "mac"}),
        Change("no residual", "rule", {"residual": False}),
        Change("gated delta [no residual]", "rule", {"rule": "gated_delta", "residual": False}),
        Change("delta [no residual]", "rule", {"rule": "delta", "residual": False}),
        Change("Yaad", "rule", {"rule": "yaad"}),
        Change("no momentum", "gates", {"memory": {"eta_max": 0.0}}),
        Change("no forgetting", "gates", {"memory": {"alpha_max": 0.0}}),
        Change("gates never at zero", "gates", {"memory": {"gate_epsilon": 0.0}}),
        Change("theta up to 0.1", "gates", {"theta_max": 0.1}),
        Change("clip 1", "gates", {"clip": 1.0}),
        Change("no lesson in writing", "lessons", {"teach": 0.0}),
        Change("no charge for writing", "lessons", {"penalty": 0.0}),
        Change("queries start unlike keys", "lessons", {"alike": False}),
        Change(f"layers {2 * s.layers}", "depth", {"layers": 2 * s.layers}),
        Change("norm", "depth", {"norm": True}),
        Change("depth 2", "depth", {"depth": 2}),
        Change("depth 2 [norm]", "depth", {"depth": 2, "norm": True}),
        Change(f"chunk {s.chunk // 4}", "chunk", {"chunk": s.chunk // 4}),
        Change(f"chunk {s.chunk // 2}", "chunk", {"chunk": s.chunk // 2}),
        Change(f"window {2 * s.window}", "chunk", wide),
        Change(f"chunk {2 * s.chunk} [window {2 * s.window}]", "chunk", {"chunk": 2 * s.chunk, **wide}),
        Change("Moneta", "rule", {"rule": "moneta"}),
        Change("Memora, theta up to 10", "rule", {"rule": "memora", "theta_max": 10.0}),
    ]
