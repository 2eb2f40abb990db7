"""How much a tenant may use. Owns the token rate and the sums of what is stored; knows no route and no key.

The rate is a bucket that fills with a minute's tokens a minute and may go into debt: any request passes while
the bucket isn't empty, and what it really used is taken afterwards. It is kept by this process alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import QuotaExceeded

BYTES_PER_TOKEN = 4
"""What an upload is charged at, before its tokens are known."""


@dataclass
class _Bucket:
    level: float
    at: float


class TokenRate:
    """Tokens a minute per tenant; None: no limit."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, _Bucket] = {}
        self._used: dict[str, int] = {}

    def admit(self, tenant: str) -> None:
        """Raise QuotaExceeded while this tenant's bucket is empty."""
        if self.per_minute is None:
            return
        bucket = self._fill(tenant, self.per_minute)
        if bucket.level <= 0:
            wait = (1 - bucket.level) * 60 / self.per_minute
            raise QuotaExceeded(
                f"the limit of {self.per_minute} tokens a minute is used up",
                code="rate_limit_exceeded",
                retry_after=wait,
            )

    def charge(self, tenant: str, tokens: int) -> None:
        self._used[tenant] = self._used.get(tenant, 0) + tokens
        if self.per_minute is not None:
            self._fill(tenant, self.per_minute).level -= tokens

    def used(self, tenant: str) -> int:
        """Tokens charged to this tenant since the server started."""
        return self._used.get(tenant, 0)

    def remaining(self, tenant: str) -> int | None:
        if self.per_minute is None:
            return None
        return max(0, int(self._fill(tenant, self.per_minute).level))

    def _fill(self, tenant: str, per_minute: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(tenant, _Bucket(float(per_minute), now))
        bucket.level = min(float(per_minute), bucket.level + (now - bucket.at) * per_minute / 60)
        bucket.at = now
        return bucket


class TenantLimits:
    """What a tenant keeps in the store, and how much that may be. The sum is read again after a few
    seconds."""

    FRESH_SECONDS = 5.0
    PAGE = 1000

    def __init__(self, store: SessionStore, sessions: int | None, stored_bytes: int | None) -> None:
        self._store, self.max_sessions, self.max_bytes = store, sessions, stored_bytes
        self._sums: dict[str, tuple[float, int, int]] = {}

    async def admit_session(self, tenant: str) -> None:
        """Raise QuotaExceeded when this tenant may not make one more session."""
        if self.max_sessions is not None:
            count, _ = await self.used(tenant, fresh=True)
            if count >= self.max_sessions:
                raise QuotaExceeded(f"the limit of {self.max_sessions} sessions is reached", retry_after=60)
        await self.admit_bytes(tenant, 0)

    async def admit_bytes(self, tenant: str, more: int) -> None:
        """Raise QuotaExceeded when ``more`` bytes would be too many."""
        if self.max_bytes is not None:
            _, stored = await self.used(tenant)
            if stored + more > self.max_bytes:
                raise QuotaExceeded(f"the limit of {self.max_bytes} stored bytes is reached", retry_after=60)

    async def used(self, tenant: str, fresh: bool = False) -> tuple[int, int]:
        """(sessions, stored bytes) of a tenant."""
        known = self._sums.get(tenant)
        if known is None or fresh or time.monotonic() - known[0] > self.FRESH_SECONDS:
            count, stored = await asyncio.to_thread(self._sum, tenant)
            known = self._sums[tenant] = (time.monotonic(), count, stored)
        return known[1], known[2]

    def _sum(self, tenant: str) -> tuple[int, int]:
        count, stored, after = 0, 0, None
        while page := self._store.list_sessions(tenant, after, self.PAGE):
            count += len(page)
            stored += sum(self._store.stored_bytes(session_id) for session_id in page)
            after = page[-1]
        return count, stored
