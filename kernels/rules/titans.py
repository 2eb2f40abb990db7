"""The Titans rule (arXiv 2501.00663, eq. 12-14): square loss, weight decay, momentum."""

from __future__ import annotations

from mnemosyne.kernels.rules.rule import Algorithm, Architecture, MemoryRule, Retention, Square


def titans(depth: int, architecture: Architecture, clip: float | None) -> MemoryRule:
    return MemoryRule(
        architecture=architecture,
        bias=Square(),
        retention=Retention(),
        algorithm=Algorithm(momentum=True, clip=clip),
    )
