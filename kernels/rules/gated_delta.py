"""The gated delta rule (arXiv 2412.06464; Titans without momentum): square loss on one matrix, weight
decay."""

from __future__ import annotations

from mnemosyne.kernels.rules.rule import Algorithm, Architecture, MemoryRule, Retention, Square, linear_only


def gated_delta(depth: int, architecture: Architecture, clip: float | None) -> MemoryRule:
    linear_only("gated_delta", depth, architecture)
    return MemoryRule(
        architecture=architecture, bias=Square(), retention=Retention(), algorithm=Algorithm(clip=clip)
    )
