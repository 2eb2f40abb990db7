"""A session as its journal tells it: versions, documents, replies.

Pure: records in, ``Session`` out. Knows no store, engine or clock. Token ids stay in the journal; here is
only where they are, so that a session of ten million tokens stays small in memory.

A *commit* is a record that ends at a state (a turn, a piece of a document, a rewind, an import, the first
record); its number is the record's index in the journal, and snapshots are stored under that number. A
*version* is a commit that was acknowledged. Every commit stands on a ``Point`` of another commit, maybe of
the parent session.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mnemosyne.engine.errors import DocumentNotFound, SnapshotCorrupt, VersionNotFound
from mnemosyne.server.sessions import records as r
from mnemosyne.server.sessions.records import Point
from mnemosyne.server.sessions.views import DocumentStatus

MadeBy = Literal["created", "forked", "turn", "document", "rewound", "imported"]
REPLY_SECONDS = 24 * 3600.0
ENDED = ("absorbed", "rejected", "cancelled")


@dataclass(frozen=True)
class Commit:
    index: int
    base: Point | None
    """What its own tokens come after; None: nothing was read before."""
    tokens: int
    """Tokens of the log up to here, its own included."""
    readable: bool = True
    """Whether its own tokens' ids are in the journal."""

    @property
    def first(self) -> int:
        """Log position of its own first token."""
        return self.base.tokens if self.base is not None else 0


@dataclass(frozen=True)
class Version:
    number: int
    index: int
    """Its commit."""
    tokens: int
    created_at: float
    made_by: MadeBy
    log_offset: int
    name: str | None = None


@dataclass(frozen=True)
class Document:
    id: str
    name: str
    content_type: str
    form: str
    length: int | None
    sha256: str | None
    created_at: float
    status: DocumentStatus = "receiving"
    nbytes: int | None = None
    """Bytes of the whole, once received."""
    absorbed_bytes: int = 0
    absorbed_tokens: int = 0
    last_piece: int | None = None
    """Commit of the newest piece."""
    version: int | None = None
    error: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class KeptReply:
    body_hash: str
    index: int
    """The record that holds the payload."""
    at: float


@dataclass
class Session:
    """Grown record by record by ``apply``; whoever holds it reads, and changes it by appending to the
    journal."""

    created: r.Created
    length: int = 0
    """Records applied."""
    commits: dict[int, Commit] = field(default_factory=dict)
    versions: dict[int, Version] = field(default_factory=dict)
    documents: dict[str, Document] = field(default_factory=dict)
    """In the order in which they were made."""
    replies: dict[str, KeptReply] = field(default_factory=dict)
    head: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)
    expires_at: float | None = None
    deleted: bool = False

    @property
    def id(self) -> str:
        return self.created.session_id

    @property
    def newest(self) -> Version:
        return self.versions[self.head]

    def point(self, version: int | None = None) -> Point:
        """Where a version ends; None: the newest. Raises VersionNotFound."""
        made = self.versions.get(self.head if version is None else version)
        if made is None:
            raise VersionNotFound(f"the session has no version {version}", version=version)
        return self._at(made.index)

    @property
    def newest_commit(self) -> Point:
        """The newest version, or the newest absorbed piece of the document that is being read on top of
        it."""
        document = self.reading
        if document is not None and document.last_piece is not None:
            return self._at(document.last_piece)
        return self.point()

    @property
    def waiting(self) -> Document | None:
        """The oldest document that isn't ended, whole or not: the next to be read."""
        return next((d for d in self.documents.values() if not d.ended), None)

    @property
    def reading(self) -> Document | None:
        """The document that is next and whole."""
        document = self.waiting
        return document if document is not None and document.status in ("queued", "absorbing") else None

    @property
    def pending(self) -> Document | None:
        """The oldest whole document that isn't read yet: while there is one, no turn may learn."""
        return next((d for d in self.documents.values() if d.status in ("queued", "absorbing")), None)

    def document(self, document_id: str) -> Document:
        found = self.documents.get(document_id)
        if found is None:
            raise DocumentNotFound("the session has no such document", document=document_id)
        return found

    def _at(self, index: int) -> Point:
        return Point(self.id, index, self.commits[index].tokens)

    def apply(self, record: r.Record) -> None:
        """Take the next record of the journal. Raises SnapshotCorrupt if it can't follow what came before."""
        try:
            self._apply(record)
        except (KeyError, AssertionError) as error:
            raise SnapshotCorrupt(
                f"record {self.length} of the journal can't follow those before it"
            ) from error
        self.length += 1

    def _apply(self, record: r.Record) -> None:
        reply: r.Reply | None = getattr(record, "reply", None)
        if reply is not None:
            self.replies[reply.key] = KeptReply(reply.body_hash, self.length, record.at)
        match record:
            case r.Created():
                base = record.parent.point if record.parent is not None else None
                self._commit(Commit(self.length, base, base.tokens if base is not None else 0))
                self._version(1, record, "forked" if base is not None else "created")
                self.metadata, self.expires_at = record.metadata, record.expires_at
            case r.Turn():
                self._grow(self.point(), record.tokens.count, record.tokens.packed is not None)
                self._version(record.version, record, "turn")
            case r.DocumentPiece():
                document = self.documents[record.document]
                base = self._at(document.last_piece) if document.last_piece is not None else self.point()
                self._grow(base, record.tokens.count, record.tokens.packed is not None)
                self._document(
                    document,
                    status="absorbing",
                    last_piece=self.length,
                    absorbed_bytes=record.nbytes,
                    absorbed_tokens=document.absorbed_tokens + record.tokens.count,
                )
            case r.DocumentAbsorbed():
                document = self.documents[record.document]
                assert document.last_piece is not None
                self._version(record.version, record, "document", document.last_piece)
                self._document(document, status="absorbed", version=record.version)
            case r.Rewound():
                self._commit(Commit(self.length, record.target, record.target.tokens))
                self._version(record.version, record, "rewound")
            case r.Imported():
                self._commit(Commit(self.length, None, record.tokens_seen, readable=False))
                self._version(record.version, record, "imported")
            case r.VersionNamed():
                self.versions[record.version] = replace(self.versions[record.version], name=record.name)
            case r.VersionDeleted():
                del self.versions[record.version]
            case r.Patched():
                self.metadata, self.expires_at = record.metadata, record.expires_at
            case r.Deleted():
                self.deleted = True
            case _:
                self._apply_document(record)

    def _apply_document(self, record: r.Record) -> None:
        match record:
            case r.DocumentCreated():
                self.documents[record.document] = Document(
                    record.document,
                    record.name,
                    record.content_type,
                    record.form,
                    record.length,
                    record.sha256,
                    record.at,
                )
            case r.DocumentReceived():
                self._document(self.documents[record.document], status="queued", nbytes=record.nbytes)
            case r.DocumentEnded():
                self._document(
                    self.documents[record.document],
                    status="rejected" if record.status == "rejected" else "cancelled",
                    error=record.error,
                    last_piece=None,
                    absorbed_bytes=0,
                    absorbed_tokens=0,
                )

    def _commit(self, commit: Commit) -> None:
        self.commits[commit.index] = commit

    def _grow(self, base: Point, count: int, readable: bool) -> None:
        self._commit(Commit(self.length, base, base.tokens + count, readable))

    def _version(self, number: int, record: r.Record, made_by: MadeBy, index: int | None = None) -> None:
        index = self.length if index is None else index
        tokens = self.commits[index].tokens
        self.versions[number] = Version(number, index, tokens, record.at, made_by, self.length)
        self.head = number

    def _document(self, document: Document, **changes: Any) -> None:
        self.documents[document.id] = replace(document, **changes)


def replay(data: Iterable[bytes]) -> Session:
    """A session from its whole journal. Raises SnapshotCorrupt, SnapshotUnsupported."""
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        raise SnapshotCorrupt("the journal is empty") from None
    created = r.parse(first)
    if not isinstance(created, r.Created):
        raise SnapshotCorrupt("the journal doesn't begin with a creation")
    session = Session(created)
    session.apply(created)
    for record in iterator:
        session.apply(r.parse(record))
    return session
