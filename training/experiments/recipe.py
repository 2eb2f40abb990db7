"""What matters when a model is trained to remember bAbI's facts among book text?

Short runs of equal length on the same rows, each with one difference from the base recipe, judged by
validation stories in rows as long as those of training and in rows eight times as long with eight times the
noise. A run is written to a file as it ends, and those that are there aren't made again.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mnemosyne.training.experiments import recipe_rows, recipe_run, recipe_tables
from mnemosyne.training.experiments.recipe_changes import LONGER, SETTINGS, Change, Setting, changes
from mnemosyne.training.experiments.recipe_run import RunSettings
from mnemosyne.training.experiments.recipe_tables import Row
from mnemosyne.training.experiments.report import Panel, Table
from mnemosyne.training.feed import Arrays

__all__ = ["SETTINGS", "Sources", "run"]


@dataclass(frozen=True)
class Sources:
    """Where the rows come from, where the runs go, and which of all runs are to be made."""

    data: Path
    """Folder of ``training.corpus``'s token files."""
    babi: Path
    runs: Path
    """File with a line of JSON a run; the processes of all parts write to one."""
    part: tuple[int, int] = (1, 1)
    """(number, of how many)."""

    def settings(self, change: Change, setting: Setting) -> RunSettings:
        return change.applied(setting, self.data, self.babi)


def run(setting: Setting, device: torch.device, sources: Sources) -> tuple[list[Table], list[Panel]]:
    """Make what of this part isn't there yet, and tables of all that is. A run that fails is told of and made
    again next time."""
    number, parts = sources.part
    every = changes(setting)
    there = finished(setting, sources.runs)
    todo = [change for change in every[number - 1 :: parts] if change.name not in there]
    if todo:
        sources.runs.parent.mkdir(parents=True, exist_ok=True)
        with sources.runs.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_off(sources.runs))
            for row in made(setting, device, sources, todo):
                file.write(f"{json.dumps(row)}\n")
                file.flush()  # in one piece: another part writes to the file too
        there = finished(setting, sources.runs)
    return recipe_tables.tables(setting, every, there), recipe_tables.panels(setting, every, there)


def made(setting: Setting, device: torch.device, sources: Sources, todo: Sequence[Change]) -> Iterator[Row]:
    """A row for every change, as its run ends."""
    sizes = [
        (setting.judged, setting.length, setting.noise),
        (-(-setting.judged // 4), LONGER * setting.length, LONGER * setting.noise),
    ]
    rows: dict[int, list[Arrays]] = {}
    with ProcessPoolExecutor(setting.workers, multiprocessing.get_context("spawn")) as pool:
        judged = recipe_rows.judged(pool, sources.settings(todo[0], setting), sizes)
        for change in todo:
            settings = sources.settings(change, setting)
            if settings.seed not in rows:
                rows[settings.seed] = recipe_rows.trained(pool, settings, setting.steps)
            try:
                found = recipe_run.run(settings, device, rows[settings.seed], judged, setting.far)
            except Exception:  # whatever it is: it costs no other run
                print(f"{change.name}: failed", flush=True)
                traceback.print_exc()
                continue
            row = {"name": change.name, "setting": dataclasses.asdict(setting), **found}
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
