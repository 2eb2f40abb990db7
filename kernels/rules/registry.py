"""Every rule by its name. A new one is a file beside this one and a line here (docs/adding-a-rule.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from mnemosyne.kernels.rules.delta import delta
from mnemosyne.kernels.rules.gated_delta import gated_delta
from mnemosyne.kernels.rules.memora import memora
from mnemosyne.kernels.rules.moneta import moneta
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule
from mnemosyne.kernels.rules.titans import titans
from mnemosyne.kernels.rules.yaad import yaad

RULES: dict[str, Callable[..., MemoryRule]] = {
    "titans": titans,
    "moneta": moneta,
    "yaad": yaad,
    "memora": memora,
    "delta": delta,
    "gated_delta": gated_delta,
}
"""Each called as (depth, architecture, clip, **options); raises ValueError for what the rule can't have."""


def make_rule(
    name: str,
    *,
    depth: int,
    architecture: Architecture,
    clip: float | None,
    options: Mapping[str, float],
) -> MemoryRule:
    """Raises ValueError, with the reason, for a name, depth, form or option that there isn't."""
    if name not in RULES:
        raise ValueError(f"there is no rule {name!r}; there are {', '.join(RULES)}")
    known = list(inspect.signature(RULES[name]).parameters)[3:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = f"; it has {', '.join(known)}" if known else ""
        raise ValueError(f"the {name} rule has no option {', '.join(unknown)}{has}")
    return RULES[name](depth, architecture, clip, **options)
