"""Documents' bytes in Redis: pieces of a fixed size and a length that counts. Knows no text."""

from __future__ import annotations

from mnemosyne.checkpoints import redis_scripts as scripts
from mnemosyne.checkpoints.names import document_name
from mnemosyne.checkpoints.redis_writer import Doubt, RedisWriter
from mnemosyne.engine.errors import OffsetMismatch, SessionNotFound, SnapshotCorrupt

PIECE_BYTES = 4_000_000


class RedisSpool:
    """The spool part of ``SessionStore``, in the protocol's words."""

    def __init__(self, writer: RedisWriter) -> None:
        self._writer = writer
        self._link = writer.link

    def append(self, session_id: str, document_id: str, offset: int, data: bytes, fence: int) -> int:
        key, base = self._writer.key, self._base(session_id, document_id)
        spools, pieces = key(session_id, "spools"), key(session_id, "pieces")
        doubt = Doubt(fence, document_id=document_id, length=offset)
        at, end = offset, offset + len(data)
        while True:
            number, inside = divmod(at, PIECE_BYTES)
            part = data[at - offset : at - offset + PIECE_BYTES - inside]
            at += len(part)
            length = end if at == end and data else ""
            keys = [spools, pieces, f"{base}:{number}"]
            args = [document_id, offset, inside, part, length]
            answer = self._writer.write(session_id, scripts.SPOOL, fence, keys, args, doubt)
            if answer[0] == b"offset":
                found = int(answer[1])
                raise OffsetMismatch(f"the upload goes on at byte {found}, not {offset}", offset=found)
            if at == end:
                return end

    def length(self, session_id: str, document_id: str) -> int:
        self._writer.settle(session_id)
        spools, name = self._writer.key(session_id, "spools"), document_name(document_id)
        length = self._link.ask(lambda r: r.hget(spools, name))
        if length is None and not self._link.ask(lambda r: r.exists(self._writer.key(session_id, "session"))):
            raise SessionNotFound("no such session")
        return int(length or 0)

    def read(self, session_id: str, document_id: str, offset: int, length: int) -> bytes:
        end = min(offset + length, self.length(session_id, document_id))
        base, parts = self._base(session_id, document_id), []
        while offset < end:
            number, inside = divmod(offset, PIECE_BYTES)
            count = min(PIECE_BYTES - inside, end - offset)
            part = self._range(f"{base}:{number}", inside, inside + count - 1)
            if len(part) != count:
                raise SnapshotCorrupt(f"the spool lacks bytes from {offset + len(part)} on")
            parts.append(part)
            offset += count
        return b"".join(parts)

    def delete(self, session_id: str, document_id: str, fence: int) -> None:
        start = f"{self._base(session_id, document_id)}:".encode()
        pieces = self._writer.key(session_id, "pieces")
        names: set[bytes] = self._link.ask(lambda r: r.smembers(pieces))
        mine = [name.decode() for name in names if name.startswith(start)]
        keys = [self._writer.key(session_id, "spools"), pieces, *mine]
        self._writer.write(session_id, scripts.DELETE_SPOOL, fence, keys, [document_id])

    def _base(self, session_id: str, document_id: str) -> str:
        return self._writer.key(session_id, f"spool:{document_name(document_id)}")

    def _range(self, piece: str, first: int, last: int) -> bytes:
        data: bytes = self._link.ask(lambda r: r.getrange(piece, first, last))
        return data
