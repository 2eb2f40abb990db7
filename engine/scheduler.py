"""What the next step computes. Pure policy: knows requests by name and tokens by number, no tensor and no
model.

Every step each decoding session emits a token, since a person waits for it (up to a batch limit, beyond which
they take turns), and some sessions ingest, in a batch in which each commits the same number of chunks. How
much ingest fits into a step follows from its measured cost: as much as decodes may be held up for while some
wait, more while none do, and always at least one chunk, so that neither can starve the other.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import islice

from mnemosyne.engine.cap import Cap
from mnemosyne.engine.errors import ContextTooLong, QueueFull
from mnemosyne.engine.fairness import FairQueue


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds that an operator may set."""

    max_requests: int = 256
    """Unfinished requests, waiting and running."""
    max_queued_tokens: int = 1 << 20
    """Tokens of unfinished requests that aren't read yet; also the most that one request may bring."""
    max_decode_batch: int = 64
    """Sessions that decode in one step."""
    max_ingest_batch: int = 16
    """Sessions that ingest in one step."""
    max_ingest_tokens: int = 8192
    """Tokens that one step ingests at most, over all sessions."""
    max_super_chunk: int = 16
    """Chunks that one session commits in one step at most."""
    step_seconds: float = 0.25
    """How long the ingest of a step should take while nobody decodes: new requests and cancellations wait for
    it."""
    decode_pause_seconds: float = 0.04
    """How long the ingest of a step should hold up those who decode."""

    @classmethod
    def for_device(cls, kind: str, max_queued_tokens: int | None = None) -> Limits:
        """What suits a kind of device (torch's name for it): a GPU is at its best with far more at once."""
        limits = cls()
        if kind == "cuda":
            limits = cls(
                max_requests=1024,
                max_queued_tokens=1 << 21,
                max_decode_batch=256,
                max_ingest_batch=64,
                max_ingest_tokens=1 << 17,
                max_super_chunk=2048,
                step_seconds=1.0,
            )
        return limits if max_queued_tokens is None else replace(limits, max_queued_tokens=max_queued_tokens)


class Scheduler:
    """Requests between their acceptance and their end, in one of three places: waiting, ingest, decode."""

    def __init__(self, limits: Limits, chunk: int) -> None:
        self.limits = limits
        self._chunk = chunk
        self._ingest = FairQueue(reach=2 * limits.max_ingest_tokens)
        self._decode = FairQueue(reach=limits.max_decode_batch)
        self._tenant: dict[str, str] = {}
        self._queued: dict[str, int] = {}
        self._chunks_left: dict[str, int] = {}
        self._seconds_per_token: float | None = None
        self._most_chunks = Cap(max(1, limits.max_ingest_tokens // chunk))
        self._most_decodes = Cap(limits.max_decode_batch)

    @property
    def requests(self) -> int:
        return len(self._tenant)

    @property
    def ingesting(self) -> int:
        return len(self._ingest)

    @property
    def decoding(self) -> int:
        return len(self._decode)

    @property
    def queued_tokens(self) -> int:
        return sum(self._queued.values())

    @property
    def idle(self) -> bool:
        """Nothing to compute now (requests may wait for one another's results)."""
        return not len(self._ingest) and not len(self._decode)

    def accept(self, item: str, tenant: str, tokens: int) -> None:
        """Take a request that brings ``tokens`` tokens. Raises QueueFull, and ContextTooLong if it never
        fits."""
        limits = self.limits
        if tokens > limits.max_queued_tokens:
            raise ContextTooLong(
                f"{tokens} tokens in one request; this engine takes {limits.max_queued_tokens} at a time"
            )
        if self.requests >= limits.max_requests:
            raise QueueFull(f"{self.requests} requests are queued, which is the limit")
        if self.queued_tokens + tokens > limits.max_queued_tokens:
            raise QueueFull(
                f"{self.queued_tokens} tokens are queued and {tokens} more would pass the limit of"
                f" {limits.max_queued_tokens}"
            )
        self._tenant[item] = tenant
        self._queued[item] = tokens

    def to_ingest(self, item: str, chunks: int) -> None:
        """``item`` has ``chunks`` (at least one) whole chunks to commit."""
        self._leave(item)
        self._chunks_left[item] = chunks
        self._ingest.add(item, self._tenant[item])

    def to_decode(self, item: str) -> None:
        """``item`` has read all its tokens and emits now."""
        self._leave(item)
        self._queued[item] = 0
        self._decode.add(item, self._tenant[item])

    def finish(self, item: str) -> None:
        """Forget ``item``; unknown ones are ignored."""
        self._leave(item)
        self._tenant.pop(item, None)
        self._queued.pop(item, None)

    def ingested(self, item: str, chunks: int) -> None:
        """``item`` committed ``chunks`` chunks; its last one takes it out of the ingest."""
        tokens = chunks * self._chunk
        self._ingest.charge(item, tokens)
        self._queued[item] = max(0, self._queued[item] - tokens)
        self._chunks_left[item] -= chunks
        if not self._chunks_left[item]:
            self._leave(item)

    def decoded(self, item: str) -> None:
        self._decode.charge(item, 1)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn what ingest costs: ``tokens`` over all sessions of a step took ``seconds``."""
        cost = seconds / tokens
        known = self._seconds_per_token
        self._seconds_per_token = cost if known is None else 0.7 * known + 0.3 * cost
        self._most_chunks.succeeded()

    def decode_fitted(self) -> None:
        """A step's decode ran with the memory that there is."""
        self._most_decodes.succeeded()

    def ingest_too_large(self, chunks: int) -> bool:
        """The device hasn't the memory for ``chunks`` over all sessions of a step; False where no step is
        smaller."""
        if chunks > 1:
            self._most_chunks.failed(chunks)
        return chunks > 1

    def decode_too_large(self, sessions: int) -> bool:
        """The device hasn't the memory for ``sessions`` that decode in one step; False where no step is
        smaller."""
        if sessions > 1:
            self._most_decodes.failed(sessions)
        return sessions > 1

    def next_decode(self) -> tuple[str, ...]:
        """Who emits one token now, in the order of acceptance: a batch that stays the same needs no
        copying."""
        chosen = set(islice(self._decode.order(1), self._most_decodes.value))
        return tuple(item for item in self._tenant if item in chosen)

    def next_ingest(self, sessions: int | None = None) -> tuple[tuple[str, ...], int]:
        """Who commits chunks now, and how many each; the batch that uses most of the budget. ``sessions``: at
        most so many, at least one.

        Whoever is first in the order is in it. Among equals the batch with the most sessions. A session whose
        rest is shorter than the others' waits for its turn to be first: it makes one step small, not every
        step."""
        first = next(self._ingest.order(1), None)
        if first is None:
            return (), 0
        budget = self._budget()
        most = (
            self.limits.max_ingest_batch if sessions is None else min(sessions, self.limits.max_ingest_batch)
        )
        longest = min(budget, self.limits.max_super_chunk, self._chunks_left[first])
        rests = sorted(self._chunks_left.values())
        best: list[str] = []
        best_chunks = 0
        for chunks in self._lengths(budget, most, longest, rests):
            room = min(budget // chunks, max(1, most))
            if min(room, len(rests) - bisect_left(rests, chunks)) * chunks <= len(best) * best_chunks:
                continue
            order = self._ingest.order(chunks * self._chunk, level=True)
            batch = list(islice((item for item in order if self._chunks_left[item] >= chunks), room))
            if len(batch) * chunks > len(best) * best_chunks:
                best, best_chunks = batch, chunks
        return tuple(best), best_chunks

    def _lengths(self, budget: int, most: int, longest: int, rests: list[int]) -> list[int]:
        """Chunks per session that are worth a look, rising: what a number of sessions leaves to each, and
        where someone's rest ends. In between a batch would only be smaller."""
        shares = {budget // count for count in range(1, max(1, most) + 1)}
        return sorted(n for n in {*shares, *rests, longest} if 1 <= n <= longest)

    def _budget(self) -> int:
        """Chunks that this step may ingest over all sessions."""
        if self._seconds_per_token is None:
            return 1
        limits = self.limits
        seconds = limits.decode_pause_seconds if len(self._decode) else limits.step_seconds
        chunks = int(seconds / self._seconds_per_token) // self._chunk
        return max(1, min(chunks, self._most_chunks.value))

    def _leave(self, item: str) -> None:
        self._ingest.remove(item)
        self._decode.remove(item)
        self._chunks_left.pop(item, None)
