"""What benches call models of random weights: the presets of the papers, and one to try a bench on a CPU."""

from __future__ import annotations

from mnemosyne.engine.config import MemoryConfig, ModelConfig, Variant, preset

TRIAL = "tiny"
"""No preset of the papers."""


def config_of(name: str, variant: Variant) -> ModelConfig:
    """A preset, or the trial's. Raises ConfigError."""
    if name != TRIAL:
        return preset(name, variant)
    return ModelConfig(
        variant=variant,
        layers=2,
        dim=64,
        vocab_size=256,
        head_dim=32,
        chunk=16,
        segment=64,
        window=64,
        persistent=4,
        memory=MemoryConfig(depth=2, expansion=2),
    )
