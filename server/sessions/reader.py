"""A received document as pieces of token ids. Owns reading the spool and where a piece ends; knows no engine.

A piece ends where a block of text does (``tokens.TextBlocks``), so reading may begin again at any piece's end
and gives the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import DocumentRejected
from mnemosyne.server.sessions.lineage import Document
from mnemosyne.server.sessions.tokens import Block, TextBlocks, TextTokenizer

READ = 256 << 10
"""Bytes of the spool that are read at a time."""


@dataclass(frozen=True)
class Piece:
    ids: tuple[int, ...]
    end: int
    """Bytes of the document up to here."""
    last: bool


class DocumentReader:
    """Blocking; for one thread at a time."""

    def __init__(
        self, store: SessionStore, session_id: str, document: Document, tokenizer: TextTokenizer
    ) -> None:
        """Begins where the document has been absorbed to."""
        assert document.nbytes is not None
        self._store, self._session_id, self._document = store, session_id, document
        self._tokenizer, self._length = tokenizer, document.nbytes
        self._offset = self._end = document.absorbed_bytes
        self._blocks = self._texts() if document.form == "text" else self._ids()

    def next(self, tokens: int) -> Piece | None:
        """The next piece of at least ``tokens`` tokens, unless the document ends; None after its end."""
        ids: list[int] = []
        while len(ids) < tokens and (block := next(self._blocks, None)) is not None:
            ids += block.ids
            self._end += block.nbytes
        return Piece(tuple(ids), self._end, self._end == self._length) if ids else None

    def _texts(self) -> Iterator[Block]:
        blocks = TextBlocks()
        for data in self._spooled():
            yield from self._tokenizer.blocks(list(blocks.feed(data, final=self._offset == self._length)))

    def _ids(self) -> Iterator[Block]:
        for data in self._spooled():
            yield Block(tuple(np.frombuffer(data, dtype="<u4").tolist()), len(data))

    def _spooled(self) -> Iterator[bytes]:
        while self._offset < self._length:
            wanted = min(READ, self._length - self._offset)
            data = self._store.spool_read(self._session_id, self._document.id, self._offset, wanted)
            if len(data) != wanted:
                raise DocumentRejected(f"the stored document ends at byte {self._offset + len(data)}")
            self._offset += wanted
            yield data
