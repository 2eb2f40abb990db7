"""Rows of several makers in one batch, by their shares. Knows no fact, no story and no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mnemosyne.training.rows import Batch, Rows


class MixedRows(Rows):
    """``makers`` are (maker, share) pairs; every row is drawn anew."""

    def __init__(self, tokenizer: Tokenizer, makers: Sequence[tuple[Rows, float]], seed: int) -> None:
        super().__init__(tokenizer, [], seed)
        self._makers = [maker for maker, _ in makers]
        shares = np.array([share for _, share in makers])
        self._odds = shares / shares.sum()

    def row(self, out: Batch, row: int, length: int, noise: float) -> None:
        self._one().row(out, row, length, noise)

    def background(self, length: int) -> NDArray[np.int32]:
        return self._one().background(length)

    def _one(self) -> Rows:
        return self._makers[int(self.rng.choice(len(self._makers), p=self._odds))]
