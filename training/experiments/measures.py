"""Recall, and means over seeds with an interval. Knows no memory and no experiment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""The 97.5 % quantile of Student's distribution by the number of values."""


LARGE = 1000.0
"""Of what is larger, or not a number, a table says no more."""


def nearest(answered: Tensor, stored: Tensor, right: Tensor) -> Tensor:
    """Whether the stored value nearest to an answer is the right one: `[B, H, Q]` of 0 and 1.

    ``answered`` `[B, H, Q, d]`, ``stored`` `[B, H, N, d]`, ``right`` the index among the stored `[Q]` or
    `[B, H, Q]`.
    """
    return (torch.cdist(answered, stored).argmin(-1) == right).float()


def interval(seeds: Tensor) -> tuple[float, float]:
    """Mean over seeds `[S]` and half the width of its 95 % interval; half a width of nan for one seed."""
    count = len(seeds)
    half = STUDENT[count] * float(seeds.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(seeds.mean()), half


def shown(seeds: Tensor, factor: float = 1.0, digits: int = 2) -> str:
    """``interval`` as a cell of a table."""
    mean, half = interval(seeds.double() * factor)
    if not abs(mean) < LARGE:
        return f"over {LARGE:g}"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def percent(seeds: Tensor) -> str:
    return shown(seeds, 100, 0)
