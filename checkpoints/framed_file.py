"""An append-only file of frames, with an index of where they start.

Owns appending, cutting a torn tail, and finding damage. Knows no session, no fence, and no lock between
processes: the caller holds one while it appends.
"""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mnemosyne.checkpoints import framing
from mnemosyne.checkpoints.files import sync, write_at
from mnemosyne.engine.errors import SnapshotCorrupt

_BLOCK = 1 << 20


class FramedFile:
    """One append is one frame is one write: only the last can be torn, and then it was never acknowledged.

    The index is filled by walking headers and kept; what another process added is walked at the next call.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what
        self._mutex = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._inode = -1
        self._firsts = array("Q")
        self._positions = array("Q")
        self._end = 0
        self._next = 0

    def refresh(self, fd: int) -> tuple[int, int]:
        """Walk what is new; returns (items, bytes) of the whole frames. Raises SnapshotCorrupt."""
        with self._mutex:
            self._walk(fd)
            return self._next, self._end

    def append(self, fd: int, count: int, payload: bytes) -> int:
        """Add a frame of ``count`` items, durably; returns the number of items then.

        On OSError nothing was added.
        """
        with self._mutex:
            self._walk(fd)
            frame = framing.encode(self._next, count, payload)
            try:
                if os.fstat(fd).st_size > self._end:
                    os.ftruncate(fd, self._end)
                write_at(fd, frame, self._end)
                sync(fd)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(fd, self._end)
                    sync(fd)
                raise
            self._add(self._next, count, len(frame))
            return self._next

    def position(self, item: int) -> int:
        """Byte offset of the frame that holds ``item``, or the end, as the last refresh found them."""
        with self._mutex:
            if item >= self._next:
                return self._end
            return self._positions[bisect_right(self._firsts, item) - 1]

    def frames(self, fd: int, position: int, end: int) -> Iterator[tuple[int, bytes, int]]:
        """(first item, payload, count) of each frame from one byte offset to another.

        Raises SnapshotCorrupt.
        """
        while position < end:
            header = self._header(fd, position)
            if header is None:
                raise self._corrupt(position)
            body = _body(fd, position, header)
            if not framing.body_is_whole(header, body):
                raise self._corrupt(position)
            yield header.first, body[: header.length], header.count
            position += header.frame_bytes

    def _add(self, first: int, count: int, nbytes: int) -> None:
        self._firsts.append(first)
        self._positions.append(self._end)
        self._end += nbytes
        self._next += count

    def _walk(self, fd: int) -> None:
        stat = os.fstat(fd)
        if stat.st_ino != self._inode or stat.st_size < self._end:
            self._forget()
            self._inode = stat.st_ino
        start = self._end
        while self._end < stat.st_size:
            header = self._header(fd, self._end)
            body_start = self._end + framing.HEADER_BYTES
            if header is None:
                if _is_unwritten(fd, body_start, stat.st_size):
                    break
                raise self._corrupt(self._end)
            if header.first != self._next:
                raise self._corrupt(self._end)
            end = self._end + header.frame_bytes
            if end > stat.st_size:
                break
            if end == stat.st_size or _is_unwritten(fd, end, stat.st_size):
                # The last frame: a crash may have left its end unwritten. The others are checked when read.
                body = _body(fd, self._end, header)
                if not framing.body_is_whole(header, body):
                    if body.endswith(b"\0"):
                        break
                    raise self._corrupt(self._end)
            self._add(header.first, header.count, header.frame_bytes)
        if self._end > start:
            # Its writer may have died before it synced: what is read from here on must not vanish again.
            sync(fd)

    def _header(self, fd: int, position: int) -> framing.Header | None:
        raw = _read(fd, framing.HEADER_BYTES, position)
        return framing.parse_header(raw) if len(raw) == framing.HEADER_BYTES else None

    def _corrupt(self, position: int) -> SnapshotCorrupt:
        return SnapshotCorrupt(f"{self._what} is corrupt at byte {position}", position=position)


def _is_unwritten(fd: int, position: int, size: int) -> bool:
    """Whether the file ends before ``position`` or holds only zeros from there on, as no whole frame does."""
    if position == size:
        return _read(fd, 1, size - 1) == b"\0"
    length = 1
    while position < size:
        block = _read(fd, min(length, size - position), position)
        if not block or block.strip(b"\0"):
            return False
        position, length = position + len(block), _BLOCK
    return True


def _body(fd: int, position: int, header: framing.Header) -> bytes:
    """Payload and end byte of the frame at ``position``."""
    return _read(fd, header.length + len(framing.END), position + framing.HEADER_BYTES)


def _read(fd: int, length: int, position: int) -> bytes:
    """Up to ``length`` bytes; fewer only at the end of the file."""
    parts = []
    while length > 0:
        part = os.pread(fd, length, position)
        if not part:
            break
        parts.append(part)
        length -= len(part)
        position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
