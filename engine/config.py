"""The model's configuration. Owns names and checks; knows no tensor and no file but ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mnemosyne.engine.errors import ConfigError
from mnemosyne.kernels.rules.registry import make_rule
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule

Variant = Literal["mac", "mag", "mal", "lmm"]


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The memory network of every layer and head, and the rule that moves it (docs/words.md)."""

    rule: str = "titans"
    """One of ``kernels.rules.registry.RULES``."""
    options: dict[str, float] = field(default_factory=dict)
    """What the rule takes besides: Moneta's p and q."""
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
    eta_max: float | None = None
    """Upper end of the momentum decay eta; None: 1 where the rule has momentum."""
    alpha_max: float | None = None
    """Upper end of the forget gate alpha (the FORGET rate, as in Titans); None: 1 where the rule forgets."""
    gate_epsilon: float = 0.004
    """Gates below this are exactly zero: g(z) = relu(sigmoid(z) - eps) / (1 - eps)."""
    clip: float | None = 1.0
    """Largest norm of one token's inner gradient per head and memory layer; None: off, as in the paper."""

    def __post_init__(self) -> None:
        _need(1 <= self.depth <= 4, f"memory.depth must be 1 to 4, got {self.depth}")
        _need(self.expansion >= 1, f"memory.expansion must be at least 1, got {self.expansion}")
        _need(self.clip is None or self.clip > 0, f"memory.clip must be positive or null, got {self.clip}")
        rule = self.make_rule()
        limit = rule.retention.theta_limit
        _need(
            0 < self.theta_max <= limit,
            f"memory.theta_max must be above 0 and at most {limit:g} for {self.rule}, got {self.theta_max}",
        )
        self._settle("eta_max", rule.algorithm.momentum, "momentum")
        self._settle("alpha_max", rule.retention.forgets, "forget gate")
        _need(0 <= self.gate_epsilon < 1, f"memory.gate_epsilon must lie in [0, 1), got {self.gate_epsilon}")

    def _settle(self, name: str, exists: bool, what: str) -> None:
        value = getattr(self, name)
        if not exists:
            _need(value is None, f"the {self.rule} rule has no {what}: leave memory.{name} out")
            return
        if value is None:
            object.__setattr__(self, name, 1.0)
            return
        _need(0 <= value <= 1, f"memory.{name} must lie in [0, 1], got {value}")

    def make_rule(self) -> MemoryRule:
        """Raises ConfigError for a name, depth, form or option that there isn't."""
        try:
            return make_rule(
                self.rule,
                depth=self.depth,
                architecture=Architecture(residual=self.residual, norm=self.norm),
                clip=self.clip,
                options=self.options,
            )
        except ValueError as error:
            raise ConfigError(f"memory: {error}") from error


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
        m = self.memory
        _need(
            self.variant in ("mac", "mag", "mal", "lmm"),
            f"variant must be mac, mag, mal or lmm, got {self.variant!r}",
        )
        _need(self.layers >= 1, f"layers must be at least 1, got {self.layers}")
        _need(self.dim % self.head_dim == 0, f"dim {self.dim} is not a multiple of head_dim {self.head_dim}")
        _need(self.head_dim % 2 == 0, f"head_dim must be even for rotary positions, got {self.head_dim}")
        _need(self.chunk >= 1, f"chunk must be at least 1, got {self.chunk}")
        for name in ("segment", "window"):
            length = getattr(self, name)
            _need(self.chunk <= length, f"chunk {self.chunk} is longer than the {name}, {length}")
            _need(length % self.chunk == 0, f"{name} {length} is not a multiple of chunk {self.chunk}")
        # On equal unit keys a chunk multiplies the error by 1 - 2 (sum of theta / (1 - eta)), which grows
        # without end beyond -1.
        bounded = m.depth == 1 and m.theta_max * self.chunk <= 1 - (m.eta_max or 0)
        _need(
            m.norm or m.clip is not None or bounded,
            "a memory with neither memory.norm nor memory.clip diverges where its gates open: set one of them"
            f", or depth 1 and theta_max at most {(1 - (m.eta_max or 0)) / self.chunk:g}",
        )

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
        """Canonical. What came after the first checkpoints is left out at its default, so that their hash
        stays."""
        values = dataclasses.asdict(self)
        memory, default = values["memory"], dataclasses.asdict(MemoryConfig())
        for name in ("rule", "options"):
            if memory[name] == default[name]:
                del memory[name]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

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
            raise ConfigError(f"a field is missing or of another type: {error}") from error

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
