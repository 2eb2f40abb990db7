"""What a session's journal says: one frozen dataclass per kind of record, and their JSON. Knows no store and
no order.

A record is a JSON object; ``t`` names its kind, ``at`` is Unix seconds. Fields are only ever added, with a
default; a kind that this release doesn't know makes the journal unreadable by it (SnapshotUnsupported), never
half read.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mnemosyne.engine.errors import SnapshotCorrupt, SnapshotUnsupported
from mnemosyne.server.sessions.tokenrun import TokenRun


@dataclass(frozen=True)
class Point:
    """The first ``tokens`` tokens of the log that ends with the commit at ``index`` of a session's
    journal."""

    session_id: str
    index: int
    tokens: int


@dataclass(frozen=True)
class Parent:
    """Where a fork began."""

    version: int
    point: Point


@dataclass(frozen=True)
class Reply:
    """The first answer to a request with an idempotency key, kept with what the request did."""

    key: str
    """Hash of (tenant, route, key)."""
    body_hash: str
    payload: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    kind: ClassVar[str]
    at: float


@dataclass(frozen=True, kw_only=True)
class Created(Record):
    """The first record: a new session, or with ``parent`` a fork. Version 1."""

    kind = "created"
    session_id: str
    tenant: str
    model: str
    fingerprint: str
    metadata: dict[str, Any] = field(default_factory=dict)
    expires_at: float | None = None
    retain_input: bool = True
    parent: Parent | None = None


@dataclass(frozen=True, kw_only=True)
class Turn(Record):
    kind = "turn"
    version: int
    tokens: TokenRun
    reply: Reply | None = None


@dataclass(frozen=True, kw_only=True)
class DocumentCreated(Record):
    kind = "document_created"
    document: str
    name: str
    content_type: str
    form: str
    """``text``: the spool holds UTF-8; ``tokens``: it holds ids, 4 bytes each, little-endian."""
    length: int | None = None
    sha256: str | None = None
    reply: Reply | None = None


@dataclass(frozen=True, kw_only=True)
class DocumentReceived(Record):
    """All bytes are in the spool, and they are what was promised."""

    kind = "document_received"
    document: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class DocumentPiece(Record):
    """A piece that was absorbed; it counts once the document is."""

    kind = "document_piece"
    document: str
    tokens: TokenRun
    nbytes: int
    """Bytes of the document absorbed up to here."""
    surprise: float | None = None
    """Mean over the chunks that the piece committed."""


@dataclass(frozen=True, kw_only=True)
class DocumentAbsorbed(Record):
    kind = "document_absorbed"
    document: str
    version: int


@dataclass(frozen=True, kw_only=True)
class DocumentEnded(Record):
    """A document that won't be absorbed: the session is what it was before it."""

    kind = "document_ended"
    document: str
    status: str
    """``rejected`` or ``cancelled``."""
    error: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class VersionNamed(Record):
    kind = "version_named"
    version: int
    name: str
    reply: Reply | None = None


@dataclass(frozen=True, kw_only=True)
class VersionDeleted(Record):
    kind = "version_deleted"
    version: int


@dataclass(frozen=True, kw_only=True)
class Rewound(Record):
    kind = "rewound"
    version: int
    target: Point
    reply: Reply | None = None


@dataclass(frozen=True, kw_only=True)
class Imported(Record):
    """A state from outside; the snapshot stored under this record's index is its only source."""

    kind = "imported"
    version: int
    tokens_seen: int


@dataclass(frozen=True, kw_only=True)
class Patched(Record):
    kind = "patched"
    metadata: dict[str, Any]
    expires_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Deleted(Record):
    """Gone for its tenant; the bytes stay while forks need them."""

    kind = "deleted"


_KINDS: dict[str, type[Record]] = {
    cls.kind: cls
    for cls in (
        Created,
        Turn,
        DocumentCreated,
        DocumentReceived,
        DocumentPiece,
        DocumentAbsorbed,
        DocumentEnded,
        VersionNamed,
        VersionDeleted,
        Rewound,
        Imported,
        Patched,
        Deleted,
    )
}


def to_bytes(record: Record) -> bytes:
    """One record as compact JSON."""
    data: dict[str, Any] = {"t": record.kind}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, TokenRun):
            value = value.to_json()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if value is not None:
            data[item.name] = value
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def parse(data: bytes) -> Record:
    """Raises SnapshotUnsupported for a kind or field of another release, SnapshotCorrupt for what isn't a
    record."""
    try:
        values = json.loads(data)
        kind, cls = values["t"], _KINDS.get(values.pop("t"))
        if cls is None:
            raise SnapshotUnsupported(
                f"the journal holds a record of kind {kind!r}, which this release doesn't know"
            )
        unknown = set(values) - {item.name for item in dataclasses.fields(cls)}
        if unknown:
            raise SnapshotUnsupported(
                f"a {kind} record holds {', '.join(sorted(unknown))}, unknown to this release"
            )
        if "tokens" in values:
            values["tokens"] = TokenRun.from_json(values["tokens"])
        if values.get("reply") is not None:
            values["reply"] = Reply(**values["reply"])
        if values.get("target") is not None:
            values["target"] = Point(**values["target"])
        if values.get("parent") is not None:
            values["parent"] = Parent(values["parent"]["version"], Point(**values["parent"]["point"]))
        return cls(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotCorrupt(f"the journal holds something that isn't a record: {error}") from error
