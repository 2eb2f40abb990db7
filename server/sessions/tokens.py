"""Text to token ids and back, as a stream. Owns where a document's text is cut; knows no session and no
model.

A document is cut into blocks by its text alone, and each block is encoded by itself: however the bytes were
split on their way here, the ids are the same. A block ends at the first safe boundary at or after ``BLOCK``
characters: before a single space between two marks that aren't white, or after a single newline between two
such. Byte-level BPE whose pre-tokenizer gives a space to the word after it has a piece boundary there, so the
ids are also those of encoding the whole at once; ``TextTokenizer`` checks that on sample text when it is
loaded. A run of ``RUN`` characters without a safe boundary is cut at exactly ``RUN``, counted from its
block's start.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mnemosyne.engine.errors import ConfigError, RequestError

BLOCK = 2048
"""Characters after which a block ends at the next safe boundary."""
RUN = 8192
"""The longest block, in characters: what the tokenizer ever looks ahead."""
_BOUNDARY = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")

_SAMPLE = (
    "Plain words, a few; of them (in marks). It's 3.14, 1,000,000 or 0x7f — and \"quoted\" 'tis.\n"
    "A new line\n\nand two, \ttabs\t\n  indented  code_with_names = f(x) + y[1:]  # comment\r\n"
    "Größe, naïve café; Привет, мир! 你好，世界 and שלום 🙂 emoji 👩‍👩‍👧 end. a b c 1 2 3 , ; .\n"
    "    def method(self, *args):\n        return None\nx\ny\n1\n2\n.\n-\n"
    "last 's 't 'll trailing   spaces   \n"
)


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest is moved past
    U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(moved)})
    return alphabet


class TextBlocks:
    """The blocks of one document, made from bytes as they come; a function of the bytes' sequence alone."""

    def __init__(self, block: int = BLOCK, run: int = RUN) -> None:
        self._block, self._run = block, run
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""

    def feed(self, data: bytes, final: bool = False) -> Iterator[str]:
        """The blocks that are certain now; with ``final`` all the rest. Raises UnicodeDecodeError (offset in
        data and held-back bytes) for what isn't UTF-8: documents are checked before they are cut."""
        self._text += self._decoder.decode(data, final)
        start = 0
        while True:
            end = self._cut(start, final)
            if end is None:
                break
            yield self._text[start:end]
            start = end
        self._text = self._text[start:]

    def _cut(self, start: int, final: bool) -> int | None:
        """Where the block that begins at ``start`` ends, None while that isn't certain."""
        available = len(self._text) - start
        if available > self._block:  # a boundary is seen only with the character after it
            # The space or newline, and one mark on each side, must lie within what every reader would look
            # at.
            stop = start + self._run + 2
            for match in _BOUNDARY.finditer(self._text, start + self._block, min(len(self._text), stop)):
                if match.start() <= start + self._run:
                    return match.start()
                break
            if available >= self._run + 2:
                return start + self._run
        return len(self._text) if final and available else None


@dataclass(frozen=True)
class Block:
    """Token ids of one block of a document."""

    ids: tuple[int, ...]
    nbytes: int
    """Bytes of the document that it stands for."""


class TextTokenizer:
    """A checkpoint's tokenizer, checked. Thread-safe. Raises ConfigError for one that can't be used for
    streams."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # text never makes a special id
        self.vocab_size: int = tokenizer.get_vocab_size()
        self._bytes = self._token_bytes()
        self._check()

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"can't read the tokenizer {path}: {error}") from error
        return cls(tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text that is all there; a lone surrogate is a RequestError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text isn't valid Unicode: {error.reason}", param="prompt") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_document(self, text: str) -> tuple[int, ...]:
        """Ids as a document of this text has them."""
        return tuple(i for block in self.blocks([*TextBlocks().feed(text.encode(), True)]) for i in block.ids)

    def blocks(self, texts: Sequence[str]) -> list[Block]:
        """Of a document's blocks, each encoded by itself, on all cores and without Python's lock."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            Block(tuple(encoding.ids), len(text.encode()))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; nothing for an id outside the vocabulary or a special one."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a whole sequence; U+FFFD for bytes that aren't UTF-8."""
        return b"".join(self.token_bytes(token) for token in tokens).decode("utf-8", "replace")

    def _token_bytes(self) -> list[bytes]:
        alphabet = byte_alphabet()
        added = self._tokenizer.get_added_tokens_decoder()
        table: list[bytes] = []
        for token in range(self.vocab_size):
            if token in added:
                table.append(b"" if added[token].special else added[token].content.encode())
                continue
            text = self._tokenizer.id_to_token(token)
            if text is None or any(character not in alphabet for character in text):
                raise ConfigError(f"the tokenizer isn't byte-level BPE: token {token} is {text!r}")
            table.append(bytes(alphabet[character] for character in text))
        return table

    def _check(self) -> None:
        """Cutting at every safe boundary, and decoding, must change nothing on the sample."""
        for text in (_SAMPLE, _SAMPLE.replace("\n", " "), _SAMPLE[::-1].encode("utf-8", "ignore").decode()):
            whole = self.encode(text)
            blocks = list(TextBlocks(block=1, run=len(text)).feed(text.encode(), True))
            if tuple(i for block in blocks for i in self.encode(block)) != whole:
                raise ConfigError(
                    "the tokenizer can't be used on streams: a cut at a safe boundary changes its ids"
                )
            if self.decode(whole) != text:
                raise ConfigError("the tokenizer doesn't give back the bytes that it was given")
