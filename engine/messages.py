"""What the server and an engine say to each other. Plain data; knows no socket, no tensor and no model.

States are named by handles. A handle is a string that the caller makes up; the engine binds it to an
immutable ``SessionState``. An operation never changes the state of its ``base``: it binds a new state to
``result``. So a fork costs nothing, a turn that fails leaves no trace, and a ``learn: false`` turn is one
whose result is released. The handle ``INITIAL`` is always bound to the state of a session that has read
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mnemosyne.engine.chunk_trace import ChunkTraces

INITIAL = "initial"
FinishReason = Literal["stop", "length"]
MAX_TRACED_TOKENS = 4096
"""Of one request for values per token."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens. Draws are keyed by (seed, choice, absolute position), so a resumed session repeats
    them."""

    max_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy: the largest logit, the smallest id among equals."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    choice: int = 0
    logprobs: int | None = None
    """None: none. N: the chosen token's log probability and the N most likely tokens'."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer and aren't part of it."""
    ignore_eos: bool = False
    """``stop_ids`` end nothing: they are emitted like any other token."""


@dataclass(frozen=True, kw_only=True)
class Advance:
    """Learn ``tokens`` on top of ``base``; answered by any number of Progress, then Advanced or Failed."""

    request_id: str
    tenant: str
    base: str
    result: str
    tokens: tuple[int, ...]
    kinds: bytes | None = None
    """None: all INPUT."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Read ``prompt`` on top of ``base`` and emit tokens; answered by Progress and Token, then Finished or
    Failed.

    ``result`` is bound to base + prompt + all emitted tokens, the emitted ones of kind GENERATED; None keeps
    nothing.
    """

    request_id: str
    tenant: str
    base: str
    result: str | None
    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Export:
    """The state of ``handle`` as bytes (checkpoints.snapshot's tensor form); answered by Exported or
    Failed."""

    request_id: str
    handle: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """Bind ``handle`` to the state in ``data`` (what Export gave); answered by Loaded or Failed."""

    request_id: str
    handle: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Release:
    """Forget ``handle``; unknown handles are ignored. Not answered."""

    handle: str


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Stop a request at the next step; it is answered by Failed(error="Cancelled"). Not answered
    otherwise."""

    request_id: str


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What the engine has counted; answered by StatsReport."""

    request_id: str


@dataclass(frozen=True, kw_only=True)
class ReadTrace:
    """The pyramid of ``handle``'s state; answered by TraceReport or Failed."""

    request_id: str
    handle: str


@dataclass(frozen=True, kw_only=True)
class TraceTokens:
    """Surprise of each of ``tokens``, read on top of ``base``; binds nothing. Answered by TokenTrace or
    Failed.

    They must end where a chunk does, and be at most ``MAX_TRACED_TOKENS``."""

    request_id: str
    tenant: str
    base: str
    tokens: tuple[int, ...]


Request = Advance | Generate | Export | Load | Release | Cancel | Stats | ReadTrace | TraceTokens


@dataclass(frozen=True, kw_only=True)
class Progress:
    request_id: str
    tokens_done: int
    """Tokens of this request committed so far."""
    trace: ChunkTraces


@dataclass(frozen=True, kw_only=True)
class Advanced:
    request_id: str
    position: int
    """Committed tokens of the result."""
    tokens_seen: int


@dataclass(frozen=True, kw_only=True)
class Token:
    request_id: str
    index: int
    """0 for the first emitted token."""
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    request_id: str
    reason: FinishReason
    tokens: tuple[int, ...]
    """All emitted tokens, a stop id not included."""
    tokens_seen: int


@dataclass(frozen=True, kw_only=True)
class Exported:
    request_id: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Loaded:
    request_id: str
    position: int
    tokens_seen: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    request_id: str
    error: str
    """Name of a class in engine.errors."""
    message: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StatsReport:
    request_id: str
    values: dict[str, float]
    """Counters and gauges since the engine started; ``engine.counters`` names them."""


@dataclass(frozen=True, kw_only=True)
class TraceReport:
    request_id: str
    chunks: int
    """Committed chunks: the pyramid's last one ends here."""
    layers: int
    data: bytes
    """``pyramid.Pyramid.array`` in float32, little-endian."""


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    request_id: str
    layers: int
    data: bytes
    """Surprise and momentary surprise `[tokens, layers, 2]` in float32, little-endian: means over heads."""


Event = (
    Progress
    | Advanced
    | Token
    | Finished
    | Exported
    | Loaded
    | StatsReport
    | TraceReport
    | TokenTrace
    | Failed
)


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine says of itself when it is ready."""

    model_fingerprint: str
    """SHA-256 over weights, configuration and tokenizer: a state of another is refused."""
    numerics_fingerprint: str
    """Kind of device, dtype, kernel revision, torch version, threads: another loads, to within a bound."""
    numerics: dict[str, str]
    config: dict[str, Any]
    device: str
    dtype: str
    parameters: int
    state_bytes: int
    """Of any session's state, tensors and pyramid."""
    max_queued_tokens: int
    room_bytes: int | None = None
    """Bytes of states that it holds at most, in all tiers, those included that running requests make; None:
    as many as the server wants."""
