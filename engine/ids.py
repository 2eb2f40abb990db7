"""Token ids in a row as an array, since a GPU reads millions a second. Knows no state and no message."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""`[n]`."""
NO_IDS: Ids = np.empty(0, np.int64)


def joined(*parts: Sequence[int] | Ids) -> Ids:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def within(ids: Sequence[int], least: int, beyond: int) -> Ids:
    """``ids``, of which each is in [least, beyond). Raises OverflowError where one isn't."""
    found = np.array(ids, np.int64)
    if len(found) and (found.min() < least or found.max() >= beyond):
        raise OverflowError(f"a token id isn't in [{least}, {beyond})")
    return found
