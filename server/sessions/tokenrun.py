"""Token ids of one journal record, packed. Owns their form in JSON; knows no record and no session.

``{"n": count, "w": bytes per id, "ids": base64 of little-endian ids, "kinds": [[kind, count], ...]}``.
``ids`` is absent in a session that doesn't retain its input.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnemosyne.engine.errors import SnapshotCorrupt

# As in engine.state, which imports torch; a server whose engine is another process does without.
INPUT, GENERATED = 0, 1


@dataclass(frozen=True)
class TokenRun:
    """Ids and kinds of consecutive tokens; the ids stay packed until somebody asks for them."""

    count: int
    runs: tuple[tuple[int, int], ...]
    """(kind, how many) in order."""
    width: int = 4
    packed: str | None = None
    """Base64; None where the ids aren't retained."""

    @classmethod
    def pack(cls, ids: Sequence[int], runs: Sequence[tuple[int, int]], retain: bool = True) -> TokenRun:
        runs = tuple((kind, count) for kind, count in runs if count)
        if not retain:
            return cls(len(ids), runs)
        width = 2 if not ids or max(ids) < 1 << 16 else 4
        data = np.asarray(ids, dtype=f"<u{width}").tobytes()
        return cls(len(ids), runs, width, base64.b64encode(data).decode("ascii"))

    def ids(self) -> tuple[int, ...]:
        """Raises SnapshotCorrupt where the ids aren't retained or don't match the count."""
        if self.packed is None:
            raise SnapshotCorrupt("the session doesn't retain its input, so these tokens can't be read again")
        try:
            ids = np.frombuffer(base64.b64decode(self.packed, validate=True), dtype=f"<u{self.width}")
        except (binascii.Error, ValueError, TypeError) as error:
            raise SnapshotCorrupt(f"a journal record's tokens can't be read: {error}") from error
        if len(ids) != self.count:
            raise SnapshotCorrupt(f"a journal record holds {len(ids)} tokens and promises {self.count}")
        return tuple(ids.tolist())

    def kinds(self) -> bytes:
        """One byte per token."""
        return b"".join(bytes((kind,)) * count for kind, count in self.runs)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"n": self.count, "kinds": [list(run) for run in self.runs]}
        if self.packed is not None:
            data.update(w=self.width, ids=self.packed)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TokenRun:
        runs = tuple((int(kind), int(count)) for kind, count in data["kinds"])
        return cls(int(data["n"]), runs, int(data.get("w", 4)), data.get("ids"))
