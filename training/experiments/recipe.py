"""What matters when a model is trained to remember invented facts among other text?

Short runs of equal length on the same rows, each with one difference from the base recipe, judged by facts
that no training tells, in rows as long as those of training and in rows eight times as long with eight times
the noise. A run is written to a file as it ends, and those that are there aren't made again.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mnemosyne.training.experiments import recipe_rows, recipe_run, recipe_tables
from mnemosyne.training.experiments.recipe_changes import LONGER, SETTINGS, Change, Setting, changes
from mnemosyne.training.experiments.recipe_tables import Row
from mnemosyne.training.experiments.report import Panel, Table
from mnemosyne.training.feed import Arrays

__all__ = ["SETTINGS", "run"]


def run(setting: Setting, device: torch.device, runs: Path) -> tuple[list[Table], list[Panel]]:
    """Make what isn't in ``runs`` yet, a file with a line of JSON a run, and tables of all that is. A run
    that fails is told of and made again next time."""
    every = changes(setting)
    there = finished(setting, runs)
    todo = [change for change in every if change.name not in there]
    if todo:
        runs.parent.mkdir(parents=True, exist_ok=True)
        with runs.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_off(runs))
            for row in made(setting, device, todo):
                file.write(f"{json.dumps(row)}\n")
                file.flush()
        there = finished(setting, runs)
    return recipe_tables.tables(setting, every, there), recipe_tables.panels(setting, every, there)


def made(setting: Setting, device: torch.device, todo: Sequence[Change]) -> Iterator[Row]:
    """A row for every change, as its run ends."""
    s = setting
    maker = recipe_rows.prepare(s.text)
    judged = [
        maker.judged(s.judged, s.length, s.noise),
        maker.judged(-(-s.judged // 4), LONGER * s.length, LONGER * s.noise),
    ]
    rows: dict[int, list[Arrays]] = {}
    for change in todo:
        try:
            settings = change.applied(s, maker.tokenizer.get_vocab_size())
            if settings.seed not in rows:
                rows[settings.seed] = maker.trained(settings.seed, s.steps, s.step_tokens, s.length, s.noise)
            found = recipe_run.run(settings, device, rows[settings.seed], judged, s.far)
        except Exception:  # whatever it is: it costs no other run
            print(f"{change.name}: failed", flush=True)
            traceback.print_exc()
            continue
        row = {"name": change.name, "setting": dataclasses.asdict(s), **found}
        print(recipe_tables.summary(row), flush=True)
        yield row


def cut_off(path: Path) -> bool:
    """Whether the last line of the file was left unfinished."""
    return path.read_bytes()[-1:] not in (b"", b"\n")


def finished(setting: Setting, path: Path) -> dict[str, Row]:
    """Name -> row, of the file's runs that were made with this setting. A line that was cut off is none."""
    found: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["setting"] == dataclasses.asdict(setting):
            found[row["name"]] = row
    return found
