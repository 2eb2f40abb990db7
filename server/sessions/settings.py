"""What the session service can be told. Knows no environment and no file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    model: str
    """The served model's name, what a session's ``model`` says."""
    owner: str
    """Who holds leases: unique among the replicas of a store, and the same after a restart of this one where
    that can be told (a pod's name), so that it takes its own leases over at once."""
    lease_seconds: float = 15.0
    resident_bytes: int = 2 << 30
    """What the states held by the engine may take; the least recently used ones are saved and released."""
    replay_seconds: float = 10.0
    """Longest replay that recovery may need; sets how often snapshots are taken."""
    max_document_bytes: int = 4 << 30
