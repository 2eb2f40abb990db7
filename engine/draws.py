"""The next tokens of all sessions of a step. Owns the threads that draw them; knows no model.

A draw goes over the whole vocabulary and depends on nothing but its own session: many are made side by side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.jobs import Job
from mnemosyne.engine.runner import Decoding, Logits
from mnemosyne.engine.sampling import Choice

SIDE_BY_SIDE = 8
"""Draws from which on threads share them."""


class Draws:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(SIDE_BY_SIDE, os.cpu_count() or 1), "draw")

    def draw(
        self, jobs: Sequence[Job], rows: Sequence[Decoding], outcomes: Sequence[Logits | MnemosyneError]
    ) -> list[Choice | MnemosyneError]:
        """Of each job, from the logits after its row's last token; an error stays what it is."""
        each = map if len(jobs) < SIDE_BY_SIDE else self._threads.map
        return list(each(_draw, jobs, rows, outcomes))


def _draw(job: Job, row: Decoding, outcome: Logits | MnemosyneError) -> Choice | MnemosyneError:
    if isinstance(outcome, MnemosyneError):
        return outcome
    assert job.sampler is not None
    try:
        return job.sampler.draw(outcome, row.state.tokens_seen)
    except MnemosyneError as error:
        return error
