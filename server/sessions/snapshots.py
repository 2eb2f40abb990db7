"""When a session's state is saved, and which saved ones stay. Knows no turn and no document.

Saved often enough that a replay from the newest takes no longer than ``replay_seconds`` of measured ingest,
when a state leaves the engine, and on drain. Snapshots are a cache of the log: one that can't be written now
is only logged.
"""

from __future__ import annotations

import asyncio
import logging

from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.interface import EngineLike
from mnemosyne.server.sessions.leases import Held, Leases
from mnemosyne.server.sessions.lineage import Session
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.pace import Pace
from mnemosyne.server.sessions.residents import Resident, Residents

log = logging.getLogger(__name__)
SHARE = 0.5
"""Of the longest replay, what passes before the next snapshot: it is not written in no time."""


class Snapshots:
    def __init__(
        self,
        store: SessionStore,
        engine: EngineLike,
        residents: Residents,
        leases: Leases,
        pace: Pace,
        replay_seconds: float,
    ) -> None:
        self._store, self._engine, self._residents, self._leases = store, engine, residents, leases
        self._pace, self._replay_seconds = pace, replay_seconds
        self._saving: dict[str, asyncio.Task[None]] = {}
        self.written = 0

    @property
    def every(self) -> int:
        """Tokens after which a session's state is saved again."""
        return max(1024, int(self._pace.tokens_per_second * self._replay_seconds * SHARE))

    def consider(self, live: Live, resident: Resident) -> None:
        """Save in the background if it is time; one at a time for each session."""
        if resident.replay >= self.every and live.id not in self._saving:
            task = asyncio.create_task(self._save_or_log(live, resident))
            self._saving[live.id] = task
            task.add_done_callback(lambda _: self._saving.pop(live.id, None))

    async def save(self, live: Live, resident: Resident) -> None:
        """Put the state's snapshot under its commit. Raises what the engine or the store raise."""
        home = resident.home
        self._residents.pin(resident)
        try:
            data = await self._engine.export(resident.handle)
        finally:
            self._residents.unpin(resident)
        async with self._leases.hold(home.session_id) as held:
            await asyncio.to_thread(self._store.put_snapshot, home.session_id, home.index, data, held.fence)
            self.written += 1
            for other in self._residents.all():
                if other.home.session_id == home.session_id and other.point.tokens >= home.tokens:
                    other.saved = max(other.saved, home.tokens)
            resident.saved = home.tokens
            await self.thin(live.session, held)

    async def save_before_leaving(self, live: Live | None, resident: Resident) -> None:
        """For the newest state of a session: without a snapshot it would cost a replay to come back."""
        if live is None or not resident.claims or resident.replay <= 0 or live.session.deleted:
            return
        home = resident.home
        # A snapshot lies under a record, whose end is the state's: one inside has no place.
        if home.tokens == live.session.commits[home.index].tokens:
            await self._save_or_log(live, resident)

    async def settle(self) -> None:
        """Return when no save is running."""
        while self._saving:
            await asyncio.wait(set(self._saving.values()))

    async def thin(self, session: Session, held: Held) -> None:
        """Of the snapshots that nothing pins, keep one for each doubling of the distance from the newest."""
        refs = await asyncio.to_thread(self._store.list_snapshots, session.id)
        for index in superfluous(session, [ref.version for ref in refs], self.every):
            await asyncio.to_thread(self._store.delete_snapshot, session.id, index, held.fence)

    async def _save_or_log(self, live: Live, resident: Resident) -> None:
        try:
            await self.save(live, resident)
        except MnemosyneError as error:
            log.warning("no snapshot of session %s now: %s", live.id, error.message)


def superfluous(session: Session, kept: list[int], unit: int) -> list[int]:
    """Which of the snapshots ``kept`` (commit indices, rising) may go; ``unit``: tokens of the first
    doubling."""
    pinned = {version.index for version in session.versions.values() if version.name is not None}
    pinned |= {
        commit.index for commit in session.commits.values() if commit.base is None and not commit.readable
    }
    pinned |= {session.newest.index, *kept[-2:]}
    if not session.created.retain_input:
        pinned.add(0)  # what a fork began with can't be read again
    newest = session.newest_commit.tokens
    seen: set[int] = set()
    spare: list[int] = []
    for index in reversed(kept):
        commit = session.commits.get(index)
        distance = abs(newest - commit.tokens) if commit is not None else 0
        bucket = (distance // unit).bit_length()
        if index in pinned or (commit is not None and bucket not in seen):
            seen.add(bucket)
        else:
            spare.append(index)
    return spare
