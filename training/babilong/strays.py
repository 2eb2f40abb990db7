"""What looks like the stories' facts and tells nothing, so that a memory must learn to pass over it: their
words strewn over background, and the sentences of books that have them. Knows no row and no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from mnemosyne.training.babilong.stories import OBJECTS, PERSONS, PLACES, Story
from mnemosyne.training.corpus import Stream

RATES = (0.0, 0.003, 0.03)
"""Shares of a text's tokens where a stray begins, one drawn for each text."""
_DIRECTIONS = ("north", "south", "east", "west")
_WORD = re.compile(r"[A-Za-z]+")


def lookalikes(books: Stream, ids: Callable[[str], list[int]]) -> Stream:
    """The books' sentences about things and places of the stories ("took the letter"): a twelfth of the text,
    and nearly all that a trained model takes for facts by mistake."""
    pieces = (ids(f" {word}") for word in (*OBJECTS, *PLACES, *_DIRECTIONS))
    return books.having([piece[0] for piece in pieces if len(piece) == 1])


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
