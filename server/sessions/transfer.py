"""A session's state as a file, in and out, and what it read and said as text. Knows no HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import time
import zipfile
from collections.abc import Mapping
from typing import Any

from mnemosyne.engine.errors import SnapshotCorrupt
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.core import Core
from mnemosyne.server.sessions.lineage import Session
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.paths import chain
from mnemosyne.server.sessions.records import Point
from mnemosyne.server.sessions.residents import Resident
from mnemosyne.server.sessions.tokenrun import GENERATED
from mnemosyne.server.sessions.versions import Versions

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"
_ZIP = b"PK\x03\x04"


class Transfer:
    def __init__(self, core: Core, versions: Versions) -> None:
        self._core, self._versions = core, versions

    async def export(self, live: Live, version: int | None, log: bool) -> bytes:
        """See ``SessionService.export_state``."""
        number = live.session.newest.number if version is None else version
        point = live.session.point(number)
        data = await self._versions.export(live, number)
        if not log:
            return data
        family = await self._core.registry.family(live.session)
        return await asyncio.to_thread(self._zip, data, point, family)

    async def import_state(self, live: Live, data: bytes, if_match: int | None) -> None:
        """See ``SessionService.import_state``."""
        self._core.check_weights(live.session)
        state = await asyncio.to_thread(_state_in, data)
        async with self._core.moving(live, if_match) as held:
            handle = self._core.states.new_handle()
            loaded = await self._core.engine.load(handle, state)
            try:
                number = live.session.newest.number + 1
                record = records.Imported(at=time.time(), version=number, tokens_seen=loaded.tokens_seen)
                await live.append([record], held.fence, state)
                home = live.session.point()
                base = Resident(home, home, handle, home.tokens)
                await self._core.states.move(live, base, home, handle, saved=True)
                await self._core.states.keep_only(live, home)
            except BaseException:
                self._core.engine.release(handle)
                raise
        self._core.told(live, live.session.newest)
        await self._core.make_room()

    async def transcript(self, live: Live) -> list[dict[str, Any]]:
        """See ``SessionService.transcript``."""
        family = await self._core.registry.family(live.session)
        return await asyncio.to_thread(self._transcript, live.session.point(), family)

    def _zip(self, state: bytes, point: Point, family: Mapping[str, Session]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(STATE_FILE, state)
            lines = [json.dumps(entry, ensure_ascii=False) for entry in self._transcript(point, family)]
            archive.writestr(LOG_FILE, "".join(f"{line}\n" for line in lines))
        return out.getvalue()

    def _transcript(self, point: Point, family: Mapping[str, Session]) -> list[dict[str, Any]]:
        """What leads to a point, oldest first; a document is one entry. Blocking."""
        entries: list[dict[str, Any]] = []
        parts = list(chain(point, family))[::-1]
        for session_id, commit, limit in parts:
            wanted = limit - commit.first
            if wanted <= 0:
                continue
            data = next(iter(self._core.store.read(session_id, commit.index)))
            record = records.parse(data)
            if isinstance(record, records.Turn | records.DocumentPiece):
                self._add(entries, record, family[session_id], commit.index, wanted)
            else:
                entries.append(_entry("imported", None, [], wanted))
        for entry in entries:
            entry["text"] = self._core.tokenizer.decode(entry["tokens"])
        return entries

    def _add(
        self,
        entries: list[dict[str, Any]],
        record: records.Turn | records.DocumentPiece,
        session: Session,
        index: int,
        wanted: int,
    ) -> None:
        """Add the first ``wanted`` tokens of a record; pieces of one document go on in its entry."""
        run = record.tokens
        ids = run.ids()[:wanted] if run.packed is not None else ()
        if isinstance(record, records.DocumentPiece):
            version = session.documents[record.document].version
            if not entries or entries[-1].get("document") != record.document:
                entries.append(_entry("document", version, [], 0, record.document))
            entries[-1]["tokens"] += ids
            entries[-1]["count"] += min(wanted, run.count)
            return
        start = 0
        for kind, count in run.runs:
            count = min(count, wanted - start)
            if count > 0:
                name = "generated" if kind == GENERATED else "input"
                entries.append(_entry(name, record.version, list(ids[start : start + count]), count))
            start += count


def _entry(
    kind: str, version: int | None, tokens: list[int], count: int, document: str | None = None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": kind, "version": version, "tokens": tokens, "count": count}
    return entry if document is None else {**entry, "document": document}


def _state_in(data: bytes) -> bytes:
    """The state file, alone or in the zip that an export with the log is."""
    if not data.startswith(_ZIP):
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read(STATE_FILE)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, ValueError) as error:
        raise SnapshotCorrupt(f"the archive holds no readable {STATE_FILE}: {error}") from error
