"""How much each part of the GPU bench does: in full, in a trial, and at toy size on a CPU. Numbers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

MANY = 10_000_000


@dataclass(frozen=True)
class Plan:
    piece: int = 131_072
    """Tokens in a call while one stream reads."""
    single: int = 1 << 20
    """Tokens of a single stream."""
    many: int = MANY
    """Tokens of the stream whose speed must stay."""
    early: int = 65_536
    """Where it is compared with."""
    windows: int = 8
    """Calls that are compared, early and late."""
    sessions: int = 64
    """That read together."""
    each: int = 16_384
    """Tokens of each of them."""
    batches: tuple[int, ...] = (1, 64, 256)
    """Sessions that decode together."""
    context: int = 4096
    """Tokens before a session decodes."""
    steps: int = 128
    """Decoded tokens of each."""
    switches: int = 20
    peer_tokens: tuple[int, ...] = (4096, 32_768)
    peer_batch: int = 32
    peer_context: int = 1024
    peer_steps: int = 8


FULL = Plan()
QUICK = replace(FULL, single=1 << 18, many=1 << 20, windows=4, each=4096, context=1024, steps=64, switches=8)
TOY = Plan(
    piece=128,
    single=512,
    many=1024,
    early=128,
    windows=2,
    sessions=6,
    each=64,
    batches=(1, 5),
    context=32,
    steps=20,
    switches=2,
    peer_tokens=(128, 256),
    peer_batch=2,
    peer_context=64,
    peer_steps=2,
)

SECONDS = {"ingest": 45.0, "aggregate": 45.0, "decode": 60.0, "switch": 20.0, "long": 150.0, "peers": 150.0}
"""How long one part may go on for one model (``peers``: one peer)."""
