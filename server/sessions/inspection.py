"""Whether a document's bytes are what was promised, as they come. Owns the checks; knows no store."""

from __future__ import annotations

import codecs
import hashlib

from mnemosyne.engine.errors import DocumentRejected
from mnemosyne.server.sessions.lineage import Document


class Inspector:
    """Feed the bytes in order, then ``finish``. Raises DocumentRejected; what is wrong then stays wrong."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._hash = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.offset = 0
        """Bytes fed."""

    def feed(self, data: bytes) -> None:
        """The offset of a byte that isn't UTF-8 is in the error's ``offset``."""
        self._hash.update(data)
        if self._document.form == "text":
            self._decode(data, False)
        self.offset += len(data)
        length = self._document.length
        if length is not None and self.offset > length:
            raise DocumentRejected(f"the document is longer than the {length} bytes it was announced with")

    def finish(self) -> None:
        """All bytes are there."""
        document = self._document
        if self.offset == 0:
            raise DocumentRejected("the document is empty")
        if document.length is not None and self.offset != document.length:
            raise DocumentRejected(
                f"the document has {self.offset} bytes and was announced with {document.length}"
            )
        if document.form == "text":
            self._decode(b"", True)
        if document.sha256 is not None and self._hash.hexdigest() != document.sha256.lower():
            raise DocumentRejected(
                "the document's SHA-256 isn't the one it was announced with", sha256=self._hash.hexdigest()
            )

    def _decode(self, data: bytes, final: bool) -> None:
        held = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            at = self.offset - held + error.start
            raise DocumentRejected(
                f"the document isn't UTF-8 at byte {at}: {error.reason}", offset=at
            ) from error
