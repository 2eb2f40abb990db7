"""Words of the stories strewn over background, where they tell nothing: what a memory must learn to pass over
isn't the words of facts but all that hasn't their form. Knows no row and no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from mnemosyne.training.babilong.stories import OBJECTS, PERSONS, PLACES, Story

RATES = (0.0, 0.003, 0.03)
"""Shares of a text's tokens where a stray begins, one drawn for each text."""
_WORD = re.compile(r"[A-Za-z]+")


class Strays:
    def __init__(
        self, stories: Iterable[Story], ids: Callable[[str], list[int]], rng: np.random.Generator
    ) -> None:
        """``ids`` gives a text's tokens."""
        words = {*PERSONS, *OBJECTS, *PLACES}
        for story in stories:
            words.update(word for fact in story.facts for word in _WORD.findall(fact))
        self._pieces = [ids(f" {word}") for word in sorted(words)]
        self._rng = rng

    def strew(self, tokens: NDArray[np.int32], background: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Put strays where nothing but ``background`` `[T]` stands, in place of it; where they are `[T]`."""
        strewn = np.zeros(len(tokens), np.bool_)
        for at in np.flatnonzero(self._rng.random(len(tokens)) < self._rng.choice(RATES)).tolist():
            piece = self._pieces[int(self._rng.integers(len(self._pieces)))]
            here = slice(at, at + len(piece))
            if here.stop <= len(tokens) and background[here].all():
                tokens[here], strewn[here] = piece, True
        return strewn
