"""The next tokens of all sessions of a step. Owns the threads that draw them; knows no model.

A draw goes over the whole vocabulary and depends on nothing but its own session: many are made side by side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.jobs import Job
from mnemosyne.engine.runner import Decoding, Logits
from mnemosyne.engine.sampling import Choice

SIDE_BY_SIDE = 8
"""Draws from which on threads share them."""


class Turn(NamedTuple):
    job: Job
    row: Decoding
    outcome: Logits | MnemosyneError
    """After the row's last token."""


class Draws:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(SIDE_BY_SIDE, os.cpu_count() or 1), "draw")

    def draw(self, turns: Sequence[Turn]) -> list[Choice | MnemosyneError]:
        """Of each turn; an error stays what it is."""
        each = map if len(turns) < SIDE_BY_SIDE else self._threads.map
        return list(each(_draw, turns))


def _draw(turn: Turn) -> Choice | MnemosyneError:
    if isinstance(turn.outcome, MnemosyneError):
        return turn.outcome
    assert turn.job.sampler is not None
    try:
        return turn.job.sampler.draw(turn.outcome, turn.row.state.tokens_seen)
    except MnemosyneError as error:
        return error
