"""The model's configuration. Owns names and checks; knows no tensor and no file but ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mnemosyne.engine.errors import ConfigError

Variant = Literal["mac", "mag", "mal", "lmm"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The memory network of every layer and head, and the Titans rule that moves it (docs/words.md)."""

    depth: int = 2
    """L_M, the number of weight matrices: 1 is a linear memory, 2 to 4 a deep one."""
    expansion: int = 4
    """Hidden width over head_dim, for depth 2 and more."""
    residual: bool = True
    """M(x) = x + net(x)."""
    norm: bool = True
    """M(x) = [x +] LN(net(x)), without an affine part."""
    theta_max: float = 0.1
    """Upper end of the learning rate theta."""
    eta_max: float = 1.0
    """Upper end of the momentum decay eta."""
    alpha_max: float = 1.0
    """Upper end of the forget gate alpha (the FORGET rate, as in Titans)."""
    gate_epsilon: float = 0.004
    """Gates below this are exactly zero: g(z) = relu(sigmoid(z) - eps) / (1 - eps)."""
    clip: float | None = 1.0
    """Largest norm of one token's inner gradient per head and memory layer; None: off, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything of a model that isn't a weight. Configurations that are equal compute the same function."""

    variant: Variant
    layers: int
    dim: int
    vocab_size: int
    head_dim: int = 64
    chunk: int = 64
    """Tokens between two updates of the gradient's weights; part of the model."""
    segment: int = 512
    """MAC: tokens that attention sees at once."""
    window: int = 512
    """MAG, MAL: tokens that attention sees, the query's own included."""
    persistent: int = 8
    """N_p, learnable tokens that attention always sees."""
    conv: int = 4
    """Width of the causal depthwise convolution on q, k and v of the memory."""
    ffn_dim: int | None = None
    """SwiGLU's hidden width; None: 8/3 dim rounded to 64."""
    rope_theta: float = 10_000.0
    gate: Literal["default", "paper"] = "default"
    """MAC, MAG: n1(y) sigmoid(n2(m)) + n2(m); ``paper`` leaves the last term away."""
    norm_epsilon: float = 1e-6
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(message)

        m = self.memory
        need(
            self.variant in ("mac", "mag", "mal", "lmm"),
            f"variant must be mac, mag, mal or lmm, got {self.variant!r}",
        )
        need(self.layers >= 1, f"layers must be at least 1, got {self.layers}")
        need(self.dim % self.head_dim == 0, f"dim {self.dim} is not a multiple of head_dim {self.head_dim}")
        need(self.head_dim % 2 == 0, f"head_dim must be even for rotary positions, got {self.head_dim}")
        need(self.chunk >= 1, f"chunk must be at least 1, got {self.chunk}")
        need(
            self.segment % self.chunk == 0, f"segment {self.segment} is not a multiple of chunk {self.chunk}"
        )
        need(self.window % self.chunk == 0, f"window {self.window} is not a multiple of chunk {self.chunk}")
        need(1 <= m.depth <= 4, f"memory.depth must be 1 to 4, got {m.depth}")
        need(m.expansion >= 1, f"memory.expansion must be at least 1, got {m.expansion}")
        need(m.theta_max > 0, f"memory.theta_max must be positive, got {m.theta_max}")
        need(0 <= m.eta_max <= 1, f"memory.eta_max must lie in [0, 1], got {m.eta_max}")
        need(0 <= m.alpha_max <= 1, f"memory.alpha_max must lie in [0, 1], got {m.alpha_max}")
        need(0 <= m.gate_epsilon < 1, f"memory.gate_epsilon must lie in [0, 1), got {m.gate_epsilon}")
        need(m.clip is None or m.clip > 0, f"memory.clip must be positive or null, got {m.clip}")

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def ffn(self) -> int:
        return self.ffn_dim or round(8 / 3 * self.dim / 64) * 64

    @property
    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each weight matrix of one head's memory network."""
        hidden, d, depth = self.memory.expansion * self.head_dim, self.head_dim, self.memory.depth
        widths = [d] + [hidden] * (depth - 1) + [d]
        return tuple((widths[i + 1], widths[i]) for i in range(depth))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        values = dict(values)
        memory = dict(values.pop("memory", {}))
        for known, given in ((cls, values), (MemoryConfig, memory)):
            unknown = set(given) - {f.name for f in dataclasses.fields(known)}
            if unknown:
                raise ConfigError(f"unknown configuration field(s): {', '.join(sorted(unknown))}")
        try:
            return cls(**values, memory=MemoryConfig(**memory))
        except TypeError as error:
            raise ConfigError(f"incomplete configuration: {error}") from error

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't read the configuration {path}: {error}") from error


def _preset(
    layers: int, dim: int, variant: Variant = "mac", vocab_size: int = 32_000, **changes: Any
) -> ModelConfig:
    return ModelConfig(
        variant=variant, layers=layers, dim=dim, vocab_size=vocab_size, persistent=128, **changes
    )


PRESETS: dict[str, tuple[int, int]] = {
    "170M": (12, 768),
    "340M": (24, 1024),
    "760M": (24, 1536),
    "1.3B": (18, 2048),
}
"""The papers' names and their (blocks, dim); the true parameter count is what a table prints."""


def preset(name: str, variant: Variant = "mac", **changes: Any) -> ModelConfig:
    """One of the papers' sizes (Titans, NeurIPS text, table 5) with this project's defaults."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    layers, dim = PRESETS[name]
    return _preset(layers, dim, variant, **changes)
