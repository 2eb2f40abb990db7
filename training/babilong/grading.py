"""Whether an answer is right, and how sure a share of right answers is. Knows no sample."""

from __future__ import annotations

import math
from collections.abc import Iterable

Z = 1.959964
"""Of a 95 % interval."""


def first_sentence(answer: str) -> str:
    """Case folded, up to the first full stop."""
    return answer.casefold().split(".")[0]


def contains(answer: str, target: str) -> bool:
    """BABILong's first rule: the first sentence of the answer contains the target.

    Lists are one string ("milk,apple"), in the order and form in which the task's file has them.
    """
    return target.casefold() in first_sentence(answer)


def names_only(answer: str, target: str, question: str, labels: Iterable[str]) -> bool:
    """BABILong's later rule for QA1 to QA5: besides words of the question, the target is the only one of the
    task's answers in the first sentence."""
    said, asked = first_sentence(answer), question.casefold()
    folded = {label.casefold() for label in labels}
    return {label for label in folded if label in said and label not in asked} == {target.casefold()}


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson for ``right`` of ``count`` (at least 1), as shares."""
    share, square = right / count, Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    # At its ends the interval begins or ends there: by rounding it would just miss its own share.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
