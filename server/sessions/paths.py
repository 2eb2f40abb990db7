"""The way from a place in a session's log back to its first token, across rewinds and forks. Pure.

``family`` everywhere holds the session and its forebears, by id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mnemosyne.engine.errors import SnapshotCorrupt, VersionNotFound
from mnemosyne.server.sessions.lineage import Commit, Session
from mnemosyne.server.sessions.records import Point


@dataclass(frozen=True)
class Segment:
    """Own tokens of a commit that lie in log positions [start, stop)."""

    session_id: str
    index: int
    first: int
    """Log position of the record's first token."""
    start: int
    stop: int


def chain(point: Point, family: Mapping[str, Session]) -> Iterator[tuple[str, Commit, int]]:
    """(session id, commit, tokens of it that count) from a point back to the first token."""
    at: Point | None = point
    limit = point.tokens
    while at is not None:
        commit = family[at.session_id].commits[at.index]
        limit = min(limit, at.tokens)
        yield at.session_id, commit, limit
        at = commit.base


def canonical(point: Point, family: Mapping[str, Session]) -> Point:
    """The oldest point of the same tokens: a fork and a rewind stand on the state that they began with."""
    commit = family[point.session_id].commits[point.index]
    while commit.base is not None and point.tokens <= commit.base.tokens:
        point = Point(commit.base.session_id, commit.base.index, point.tokens)
        commit = family[point.session_id].commits[point.index]
    return point


def segments(point: Point, start: int, family: Mapping[str, Session]) -> list[Segment]:
    """Where tokens [start, point.tokens) of the point's log are, in order. Raises SnapshotCorrupt where their
    ids aren't kept."""
    found: list[Segment] = []
    stop = point.tokens
    for session_id, commit, _ in chain(point, family):
        if stop <= start:
            break
        if commit.first < stop:
            if not commit.readable:
                raise SnapshotCorrupt(
                    "the tokens after the newest usable snapshot aren't in the session's log"
                )
            found.append(Segment(session_id, commit.index, commit.first, max(start, commit.first), stop))
            stop = commit.first
    return found[::-1]


def cut(head: Point, tokens: int, family: Mapping[str, Session]) -> Point:
    """The log up to ``head`` cut to its first ``tokens`` tokens. Raises VersionNotFound."""
    if not 0 <= tokens <= head.tokens:
        raise VersionNotFound(f"the session has read {head.tokens} tokens, not {tokens}", tokens_seen=tokens)
    for session_id, commit, limit in chain(head, family):
        inside = commit.first < tokens <= limit or (tokens == 0 and commit.base is None)
        if inside and (commit.readable or tokens == commit.tokens):
            return Point(session_id, commit.index, tokens)
        if inside:
            break
    raise VersionNotFound(f"the log doesn't reach back to {tokens} tokens", tokens_seen=tokens)
