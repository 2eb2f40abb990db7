"""The rows of the recipe's runs, made by worker processes before a run begins: all runs of one seed learn
from the same rows in the same order, and all runs are judged by the same ones. Knows no model and no change.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Executor

from tokenizers import Tokenizer

from mnemosyne.training import corpus
from mnemosyne.training.babilong.stories import load_stories
from mnemosyne.training.babilong.story_rows import StoryRows
from mnemosyne.training.babilong.tasks import parse_numbers
from mnemosyne.training.feed import Arrays, draw, sampler
from mnemosyne.training.settings import Settings

TOGETHER = 25
"""Batches that one worker makes with one seed."""
JUDGED_TOGETHER = 32
"""Rows in a batch that is judged, at most."""
UNSEEN = 1_000_003
"""Seed of the rows that runs are judged by."""


def trained(pool: Executor, settings: Settings, steps: int) -> list[Arrays]:
    """A batch for every step of a run, in rows of its first length and with its noise; they depend on the
    settings' seed, not on the number of workers."""
    jobs = range(-(-steps // TOGETHER))
    made = pool.map(_batches, itertools.repeat(settings), jobs)
    return list(itertools.chain.from_iterable(made))[:steps]


def judged(pool: Executor, settings: Settings, sizes: list[tuple[int, int, float]]) -> list[list[Arrays]]:
    """Rows of validation stories among held-out books, for each (rows, length, noise)."""
    return list(pool.map(_validation, itertools.repeat(settings), *zip(*sizes, strict=True)))


def _batches(settings: Settings, job: int) -> list[Arrays]:
    made = sampler(settings, 1000 * settings.seed + job)
    length = settings.stages[0][0]
    return [draw(made, settings.step_tokens, length, settings.noise) for _ in range(TOGETHER)]


def _validation(settings: Settings, rows: int, length: int, noise: float) -> list[Arrays]:
    assert settings.babi is not None
    stories = load_stories(settings.babi, parse_numbers(settings.tasks), "validation")
    held_out = corpus.load(settings.data, "held_out")
    tokenizer = Tokenizer.from_file(str(settings.tokenizer))
    made = StoryRows(tokenizer, [(held_out, 1.0)], UNSEEN, stories)
    together = min(rows, JUDGED_TOGETHER)
    return [draw(made, together * length, length, noise) for _ in range(-(-rows // together))]
