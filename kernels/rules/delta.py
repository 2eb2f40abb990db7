"""The delta rule (arXiv 2102.11174; MIRAS, table 1): square loss on one matrix, nothing forgotten."""

from __future__ import annotations

from mnemosyne.kernels.rules.rule import Algorithm, Architecture, MemoryRule, Retention, Square, linear_only


def delta(depth: int, architecture: Architecture, clip: float | None) -> MemoryRule:
    linear_only("delta", depth, architecture)
    return MemoryRule(
        architecture=architecture,
        bias=Square(),
        retention=Retention(forgets=False),
        algorithm=Algorithm(clip=clip),
    )
