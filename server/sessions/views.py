"""What the session service takes and gives: plain frozen values. Knows no store, engine or HTTP."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mnemosyne.engine.messages import FinishReason, Sampling, Token

DocumentStatus = Literal["receiving", "queued", "absorbing", "absorbed", "rejected", "cancelled"]
Tier = Literal["device", "store"]
EventKind = Literal["progress", "surprise", "version", "tier", "error", "document"]


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """A request's ``Idempotency-Key``. Its scope is (tenant, route, key)."""

    route: str
    key: str
    body_hash: str
    """Any string that is equal for equal request bodies, a SHA-256 for one."""


@dataclass(frozen=True, kw_only=True)
class ParentInfo:
    session_id: str
    version: int


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    id: str
    model: str
    version: int
    tokens_seen: int
    state_bytes: int
    """Bytes of one committed state, its pyramid too; the same whatever was read."""
    stored_bytes: int
    """What the session takes in the store: journal, snapshots and spool."""
    tier: Tier
    """``device``: the newest version's state is held by the engine."""
    parent: ParentInfo | None
    fingerprint: str
    """The model fingerprint that the session was made under."""
    created_at: float
    """Unix seconds, as all times here."""
    expires_at: float | None
    retain_input: bool
    metadata: dict[str, Any]
    health: str
    """``ok``; ``incompatible``: made under other weights than those served; ``not_finite``: its last document
    or turn ended in a number that isn't finite (the version before stands); ``degraded``: a snapshot was
    refused."""
    gain: float | None = None
    """How much a chunk of the newest text amplified a difference of the memory: above 1 differences grow, and
    the session's state is no longer the same on other devices, however precise (``kernels.health``). None
    until this server has seen it read a few thousand tokens."""


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    version: int
    tokens_seen: int
    log_offset: int
    """Index of the journal record that made it."""
    created_at: float
    made_by: Literal["created", "forked", "turn", "document", "rewound", "imported"]
    name: str | None
    snapshot: bool
    """Whether a snapshot of it is kept, so that going there recomputes nothing."""


@dataclass(frozen=True, kw_only=True)
class DocumentInfo:
    id: str
    name: str
    content_type: str
    status: DocumentStatus
    length: int | None
    """Declared length in bytes, None if none was declared."""
    bytes_received: int
    """The upload's offset: bytes that are durable."""
    bytes_absorbed: int
    tokens_absorbed: int
    version: int | None
    """The version it made, once absorbed."""
    error: dict[str, Any] | None
    """``{"code": class name in engine.errors, "message": ..., and the error's attributes}`` of a rejected
    one."""
    created_at: float


@dataclass(frozen=True, kw_only=True)
class TurnRequest:
    """One turn of a session, or one stateless completion. All token ids; the chat template is the
    caller's."""

    prompt: tuple[int, ...]
    """Learned as INPUT."""
    sampling: Sampling
    stop: tuple[str, ...] = ()
    """Stop strings; the answer's text ends before the first one found."""
    end_of_turn: tuple[int, ...] = ()
    """Ids committed with the turn after the answer, as INPUT; not part of the answer."""
    learn: bool = True
    version: int | None = None
    """``learn: false`` only: the version to run on; None the newest commit."""
    if_match: int | None = None
    idempotency: Idempotency | None = None
    """A keyed turn goes on when its stream is closed; needs ``learn``."""


@dataclass(frozen=True, kw_only=True)
class SessionUsage:
    """What a turn did, the ``session`` field of an answer."""

    id: str
    version: int
    tokens_seen: int
    reused_tokens: int
    """Tokens of the session before this turn whose state was at hand or came from a snapshot."""
    recomputed_tokens: int
    """Tokens of the session before this turn that were replayed from the log."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of an answer's text, never half a character, and the tokens that were emitted for it."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The end of a turn. What it says is durable (where the turn learns) when it is given."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    """Tokens emitted, those past a stop string included."""
    tokens: tuple[Token, ...]
    """Emitted tokens up to the answer's end."""
    seed: int
    session: SessionUsage | None
    """None for a stateless completion."""
    repeated: bool = False
    """True when this is the first answer given again under its idempotency key."""


@dataclass(frozen=True, kw_only=True)
class SessionEvent:
    """One line of a session's event stream."""

    id: int
    kind: EventKind
    at: float
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TracePoint:
    """Tokens [first, last) of a session, and what reading them did to its memory."""

    first: int
    last: int
    overall: list[float | None]
    """In the order of ``pyramid.FIELDS``; None: not known."""
    layers: list[list[float | None]]
    text: str | None = None
    """What was read there, where asked for."""


@dataclass(frozen=True, kw_only=True)
class SurpriseTrace:
    version: int
    first: int
    last: int
    """The range that was asked for, up to what the version has read."""
    reaches: int
    """Tokens up to the end of the last committed chunk: those after it have no values yet."""
    resolution: int
    """Tokens a point, of the finest ones."""
    coarsest: int
    """Tokens of the longest point: what is long ago may be kept more coarsely than was asked for."""
    computed: int
    """Tokens that were read again for it."""
    points: tuple[TracePoint, ...]


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a deletion removed."""

    session_ids: tuple[str, ...]
    """Sessions whose bytes are gone: this one, with ``erase`` its forks, and forebears that it alone kept."""
    kept_for_forks: bool
    """True when forks still need the log: the session is gone for its tenant, its bytes go with the last
    fork."""
    removed: dict[str, int] = field(default_factory=dict)
    """Counts and bytes by kind, as the store gives them."""


def to_json(value: Any) -> dict[str, Any]:
    """A view as plain JSON data; also what is kept under an idempotency key."""
    data: dict[str, Any] = dataclasses.asdict(value)
    return data
