"""An answer's text as its tokens come. Owns stop strings: what is shown, held back, and kept. Knows no
engine."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mnemosyne.engine.messages import Token
from mnemosyne.server.sessions.tokens import TextTokenizer
from mnemosyne.server.sessions.views import Delta


class AnswerText:
    """Push tokens; each gives the Delta that may be shown. Stop strings are found in the bytes, where a
    character that is split over tokens is no special case."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(text.encode() for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes = bytearray()
        self._ends: list[int] = []
        """Where each token's bytes end."""
        self._tokens: list[Token] = []
        self._shown = 0
        self._told = 0
        """Tokens given in a Delta."""
        self.text = ""
        self.stopped_at: int | None = None
        """Byte offset of the stop string that was found."""

    def push(self, token: Token) -> Delta:
        """What can be shown now. After a stop string was found (``stopped_at``) nothing more may be
        pushed."""
        before = len(self._bytes)
        self._bytes += self._tokenizer.token_bytes(token.token)
        self._ends.append(len(self._bytes))
        self._tokens.append(token)
        self.stopped_at = self._find_stop(before)
        return self._show(
            len(self._bytes) - self._held_back() if self.stopped_at is None else self.stopped_at
        )

    def finish(self) -> Delta:
        """The rest: what was held back, U+FFFD for a character that never became whole."""
        end = len(self._bytes) if self.stopped_at is None else self.stopped_at
        delta = self._show(end)
        rest = self._decoder.decode(b"", True)
        self.text += rest
        tokens = delta.tokens + tuple(self.tokens[self._told :])
        self._told = len(self.tokens)
        return Delta(text=delta.text + rest, tokens=tokens)

    @property
    def tokens(self) -> list[Token]:
        """Emitted tokens up to the answer's end: those that begin before the stop string."""
        if self.stopped_at is None:
            return self._tokens
        starts = [0, *self._ends]
        return [token for token, start in zip(self._tokens, starts, strict=False) if start < self.stopped_at]

    def kept(self) -> tuple[int, ...]:
        """Ids to learn: the tokens before the stop string, and of a token that it cuts the text before the
        cut."""
        if self.stopped_at is None:
            return tuple(token.token for token in self._tokens)
        count = sum(1 for end in self._ends if end <= self.stopped_at)
        while True:
            start = self._ends[count - 1] if count else 0
            try:
                rest = bytes(self._bytes[start : self.stopped_at]).decode()
                break
            except UnicodeDecodeError:
                if count == 0:
                    rest = bytes(self._bytes[: self.stopped_at]).decode("utf-8", "ignore")
                    break
                count -= 1  # that token ends inside a character
        return tuple(token.token for token in self._tokens[:count]) + self._tokenizer.encode(rest)

    def _find_stop(self, before: int) -> int | None:
        found = []
        for stop in self._stops:
            at = self._bytes.find(stop, max(self._shown, before - len(stop) + 1))
            if at >= 0:
                found.append(at)
        return min(found, default=None)

    def _held_back(self) -> int:
        """Bytes at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._bytes)), longest, -1):
                if self._bytes.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _show(self, end: int) -> Delta:
        text = self._decoder.decode(bytes(self._bytes[self._shown : end]))
        self._shown = max(self._shown, end)
        self.text += text
        first = self._told
        while self._told < len(self._ends) and self._ends[self._told] <= end:
            self._told += 1
        return Delta(text=text, tokens=tuple(self._tokens[first : self._told]))
