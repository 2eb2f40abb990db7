"""Small models for tests: every variant, gates that really open and close, memory that really changes."""

from __future__ import annotations

import torch

from mnemosyne.engine.config import MemoryConfig, ModelConfig, Variant
from mnemosyne.engine.model import Titans
from mnemosyne.kernels.rules.registry import RULES

VARIANTS: tuple[Variant, ...] = ("mac", "mag", "mal", "lmm")


def small_memory(rule: str = "titans", *, depth: int = 2, norm: bool = False) -> MemoryConfig:
    """Whose gates reach far; one matrix alone for the rules that have no more."""
    matrix = rule in ("delta", "gated_delta")
    return MemoryConfig(
        rule=rule,
        depth=1 if matrix else depth,
        expansion=2,
        residual=not matrix,
        norm=norm and not matrix,
        theta_max=20.0 if rule == "memora" else 0.5,
        alpha_max=None if rule == "delta" else 0.2,
    )


def every_rule_and_depth() -> list[tuple[str, int]]:
    return [(rule, depth) for rule in RULES for depth in (1, 2, 3, 4) if depth == 1 or "delta" not in rule]


def small_config(
    variant: Variant = "mag", *, dim: int = 128, depth: int = 2, norm: bool = False, rule: str = "titans"
) -> ModelConfig:
    return ModelConfig(
        variant=variant,
        layers=2,
        dim=dim,
        head_dim=64 if dim >= 128 else 8,
        vocab_size=320,
        chunk=16,
        segment=48,
        window=32,
        persistent=4,
        memory=small_memory(rule, depth=depth, norm=norm),
    )


def small_model(config: ModelConfig, compute: torch.dtype = torch.float32, seed: int = 1) -> Titans:
    """Ready to serve; float64 makes all of it float64."""
    torch.manual_seed(seed)
    model = Titans(config)
    for block in model.blocks:
        # Gates that differ from token to token, some of them closed and some wide open.
        block.mixer.memory.gate_weight.data *= 20
    if compute == torch.float64:
        model = model.double()
    return model.prepare(compute)


def random_tokens(count: int, seed: int, vocab: int = 320) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
