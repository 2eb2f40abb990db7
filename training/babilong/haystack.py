"""The background: book sentences by number, without end. Owns what counts as one and how many tokens it has;
knows no fact.

The text is held once; what is read of it are views. A sentence keeps what stands before it, one space or,
where a line begins, one newline: there a byte-level tokenizer has a boundary, so tokens of sentences add up.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training.books import Book
from mnemosyne.training.corpus import BOOK_END

SHORTEST = 10
"""Tokens of the shortest sentence that is used, as in BABILong's sampler."""
LEAST_BYTES_PER_TOKEN = 3.3
"""On the books. Below it a length in tokens is too little text to be compared with other models'."""
_AT_ONCE = 20_000


class Haystack:
    """Sentence ``k`` is sentence ``k mod sentences`` of the books, in their order."""

    def __init__(self, text: bytes, ends: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """``ends`` and ``tokens`` `[sentences + 1]`: bytes and tokens up to each sentence's begin, from 0."""
        self._text = memoryview(text)
        self._ends, self._tokens = ends, tokens
        self.sentences = len(ends) - 1
        self.nbytes = len(text)
        self.tokens = int(tokens[-1])
        self.sha256 = hashlib.sha256(text).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / self.tokens

    def at(self, sentence: int) -> int:
        """Tokens before a sentence, from sentence 0 of the first pass on."""
        passes, place = divmod(sentence, self.sentences)
        return passes * self.tokens + int(self._tokens[place])

    def reach(self, first: int, tokens: int) -> int:
        """The sentence after the last one that is whole within ``tokens`` from sentence ``first`` on."""
        passes, rest = divmod(self.at(first) + tokens, self.tokens)
        return passes * self.sentences + int(np.searchsorted(self._tokens, rest, "right")) - 1

    def views(self, first: int, end: int) -> Iterator[memoryview]:
        """The text of sentences ``first`` to before ``end``; one view a pass over the books."""
        while first < end:
            passes, place = divmod(first, self.sentences)
            stop = min(end, (passes + 1) * self.sentences)
            last = stop - passes * self.sentences
            yield self._text[self._ends[place] : self._ends[last]]
            first = stop


def make_haystack(books: Sequence[Book], tokenizer: Tokenizer) -> Haystack:
    """Raises ConfigError for books without a sentence of ``SHORTEST`` tokens."""
    pieces: list[bytes] = []
    counts: list[int] = []
    stream = (sentence for book in books for sentence in sentences(book.text))
    while batch := list(itertools.islice(stream, _AT_ONCE)):
        for sentence, encoded in zip(
            batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True
        ):
            if len(encoded.ids) >= SHORTEST:
                pieces.append(sentence.encode())
                counts.append(len(encoded.ids))
    if not pieces:
        raise ConfigError(
            f"the books have no sentence of {SHORTEST} tokens: {', '.join(b.name for b in books)}"
        )
    ends = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return Haystack(b"".join(pieces), ends, np.cumsum([0, *counts], dtype=np.int64))


def sentences(text: str) -> Iterator[str]:
    """Each with one space before it, or one newline where its line begins; one space between its words."""
    cuts = [0, *(match.end() for match in BOOK_END.finditer(text)), len(text)]
    for begin, end in itertools.pairwise(cuts):
        sentence = text[begin:end]
        words = " ".join(sentence.split())
        if words:
            starts_line = begin == 0 or "\n" in sentence[: len(sentence) - len(sentence.lstrip())]
            yield ("\n" if starts_line else " ") + words
