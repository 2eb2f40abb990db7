"""Frames: checked pieces of an append-only file (docs/snapshot-format.md). Knows bytes, no file and no
session.

A frame is a header, a payload and an end byte. The header has a checksum of its own, so that a damaged length
is told from a write that was cut short; the end byte isn't zero, so that blocks which a power failure left
unwritten (they read as zeros) are told from a damaged frame.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from mnemosyne.engine.errors import SnapshotCorrupt, SnapshotUnsupported

MAGIC = b"MF"
VERSION = 1
END = b"\n"
_FIELDS = struct.Struct("<2sBxIQII")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECK.size
OVERHEAD = HEADER_BYTES + len(END)
MAX_PAYLOAD = 2**32 - 1


@dataclass(frozen=True)
class Header:
    length: int
    """Bytes of payload."""
    first: int
    """Index of the first item (record or byte) of the frame in its file."""
    count: int
    """Items in the frame."""
    checksum: int
    """CRC-32 of the payload."""

    @property
    def frame_bytes(self) -> int:
        return self.length + OVERHEAD


def encode(first: int, count: int, payload: bytes) -> bytes:
    """One frame. Raises ValueError where the payload is longer than a frame can say."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame holds at most {MAX_PAYLOAD} bytes, got {len(payload)}")
    fields = _FIELDS.pack(MAGIC, VERSION, len(payload), first, count, zlib.crc32(payload))
    return b"".join((fields, _CHECK.pack(zlib.crc32(fields)), payload, END))


def parse_header(raw: bytes) -> Header | None:
    """The header in ``raw`` (HEADER_BYTES of it), or None where it isn't one. Raises SnapshotUnsupported."""
    fields = raw[: _FIELDS.size]
    if _CHECK.unpack(raw[_FIELDS.size :])[0] != zlib.crc32(fields):
        return None
    magic, version, length, first, count, checksum = _FIELDS.unpack(fields)
    if magic != MAGIC:
        return None
    if version != VERSION:
        raise SnapshotUnsupported(f"a journal frame of format {version}; this version reads format {VERSION}")
    return Header(length, first, count, checksum)


def body_is_whole(header: Header, body: bytes) -> bool:
    """Whether ``body`` (payload and end byte) is what the header was made for."""
    return (
        len(body) == header.length + len(END)
        and body.endswith(END)
        and zlib.crc32(memoryview(body)[: header.length]) == header.checksum
    )


def decode(data: bytes, what: str) -> tuple[Header, bytes]:
    """The one frame that ``data`` is. Raises SnapshotCorrupt, naming ``what``."""
    header = parse_header(data[:HEADER_BYTES]) if len(data) >= HEADER_BYTES else None
    if header is None or not body_is_whole(header, data[HEADER_BYTES:]):
        raise SnapshotCorrupt(f"{what} is corrupt")
    return header, data[HEADER_BYTES : HEADER_BYTES + header.length]


def pack(records: Sequence[bytes]) -> bytes:
    """Records as one payload, so that a frame carries all of them or none."""
    return b"".join(part for record in records for part in (_CHECK.pack(len(record)), record))


def unpack(payload: bytes, count: int, what: str) -> list[bytes]:
    """The records of a payload. Raises SnapshotCorrupt where it doesn't hold exactly ``count``."""
    records, at = [], 0
    while at + _CHECK.size <= len(payload):
        (length,) = _CHECK.unpack_from(payload, at)
        at += _CHECK.size
        records.append(payload[at : at + length])
        at += length
    if at != len(payload) or len(records) != count:
        raise SnapshotCorrupt(f"{what} is corrupt: a frame doesn't hold the records that it says")
    return records
