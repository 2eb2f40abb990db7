"""The journal as values: every record comes back as it was, and a journal that makes no sense is refused."""

from __future__ import annotations

import random

import pytest

from mnemosyne.engine import state
from mnemosyne.engine.errors import SnapshotCorrupt, SnapshotUnsupported
from mnemosyne.server.sessions import records as r
from mnemosyne.server.sessions.lineage import replay
from mnemosyne.server.sessions.paths import canonical, segments
from mnemosyne.server.sessions.records import Point
from mnemosyne.server.sessions.snapshots import superfluous
from mnemosyne.server.sessions.tokenrun import GENERATED, INPUT, TokenRun

CREATED = r.Created(at=1.0, session_id="s", tenant="t", model="m", fingerprint="f", metadata={"ä": [1]})


def turn(version: int, count: int) -> r.Turn:
    return r.Turn(at=2.0, version=version, tokens=TokenRun.pack(range(count), [(INPUT, count)]))


def journal(*records: r.Record) -> list[bytes]:
    return [r.to_bytes(record) for record in records]


def test_the_kinds_are_the_engines() -> None:
    assert (INPUT, GENERATED) == (state.INPUT, state.GENERATED)


@pytest.mark.parametrize("largest", [1, 1 << 15, (1 << 16) - 1, 1 << 16, (1 << 31) - 1])
def test_token_runs_come_back(largest: int) -> None:
    rng = random.Random(largest)
    ids = tuple(rng.randint(0, largest) for _ in range(100)) + (largest,)
    run = TokenRun.pack(ids, [(INPUT, 90), (GENERATED, 11), (INPUT, 0)])
    again = TokenRun.from_json(run.to_json())
    assert again == run and again.ids() == ids and again.kinds() == bytes(90) + b"\1" * 11
    withheld = TokenRun.from_json(TokenRun.pack(ids, [(INPUT, 101)], retain=False).to_json())
    assert withheld.count == 101 and withheld.packed is None
    with pytest.raises(SnapshotCorrupt):
        withheld.ids()
    with pytest.raises(SnapshotCorrupt):
        TokenRun(100, run.runs, run.width, run.packed).ids()


def test_records_come_back() -> None:
    point = Point("s", 3, 12)
    reply = r.Reply("key", "body", {"text": "ö"})
    for record in (
        CREATED,
        r.Created(at=1.0, session_id="s", tenant="t", model="m", fingerprint="f", parent=r.Parent(4, point)),
        r.Turn(at=2.0, version=2, tokens=TokenRun.pack((1, 70_000), [(INPUT, 2)]), reply=reply),
        r.Rewound(at=3.0, version=3, target=point),
        r.DocumentEnded(at=3.0, document="d", status="rejected", error={"code": "x"}),
        r.Patched(at=3.0, metadata={}, expires_at=None),
    ):
        assert r.parse(r.to_bytes(record)) == record


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", SnapshotCorrupt),
        (b"[]", SnapshotCorrupt),
        (b'{"t":"turn","at":1}', SnapshotCorrupt),
        (b'{"t":"of the future","at":1}', SnapshotUnsupported),
        (b'{"t":"deleted","at":1,"more":2}', SnapshotUnsupported),
    ],
)
def test_what_is_no_record_is_refused(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        r.parse(data)


def test_a_journal_that_makes_no_sense_is_refused() -> None:
    absorbed = r.DocumentAbsorbed(at=1.0, document="d", version=2)
    for wrong in (journal(), journal(turn(2, 4)), journal(CREATED, absorbed)):
        with pytest.raises(SnapshotCorrupt):
            replay(wrong)


def test_the_way_back_crosses_forks_and_rewinds() -> None:
    parent = replay(journal(CREATED, turn(2, 10), turn(3, 10), turn(4, 10)))
    link = r.Parent(3, parent.point(3))
    fork = r.Created(at=1.0, session_id="c", tenant="t", model="m", fingerprint="f", parent=link)
    back = r.Rewound(at=1.0, version=3, target=Point("s", 2, 15))
    child = replay(journal(fork, turn(2, 5), back, turn(4, 7)))
    family = {"s": parent, "c": child}
    assert child.newest.tokens == 22
    assert canonical(child.point(1), family) == parent.point(3)
    found = segments(child.point(), 8, family)
    assert [(s.session_id, s.index, s.start, s.stop) for s in found] == [
        ("s", 1, 8, 10),
        ("s", 2, 10, 15),
        ("c", 3, 15, 22),
    ]
    assert [(s.index, s.start, s.stop) for s in segments(child.point(2), 0, family)] == [
        (1, 0, 10),
        (2, 10, 20),
        (1, 20, 25),
    ]


def test_snapshots_thin_out_and_named_ones_stay() -> None:
    turns = [turn(version, 1000) for version in range(2, 202)]
    session = replay(journal(CREATED, *turns, r.VersionNamed(at=1.0, version=8, name="kept")))
    kept: list[int] = []
    for index in range(1, 201):
        kept.append(index)
        spare = superfluous(session, kept, 1000)
        kept = [i for i in kept if i not in spare]
    assert {200, 199, session.versions[8].index} <= set(kept)
    assert 5 < len(kept) < 16
