"""A server without HTTP, to be killed: reads a document, takes turns, and says what was acknowledged."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mnemosyne.checkpoints.directory import DirectoryStore
from tests.server.sessions.harness import TENANT, TEXT, make_engine, make_service, turn, until_ended

DOCUMENT = TEXT * 60


def say(*words: object) -> None:
    print(*words, flush=True)


async def main(folder: Path) -> None:
    engine = make_engine()
    await engine.start()
    service = make_service(DirectoryStore(folder), engine, replay_seconds=0.001)  # snapshots all the time
    session_id = (await service.create(TENANT)).id
    say("session", session_id)
    made = await service.create_document(TENANT, session_id, name="long", text=DOCUMENT)
    say("uploaded", made.id)
    await until_ended(service, session_id, made.id)
    number = 0
    while True:
        say("asking", number)
        told = await turn(service, session_id, f"Question {number}?", max_tokens=40)
        assert told.session is not None
        say("answered", told.session.version)
        number += 1


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
