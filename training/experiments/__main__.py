"""The properties that the papers claim, each measured, with its table and its figure.

python -m mnemosyne.training.experiments [names] [--size small|full] [--device cpu|cuda] [--out FOLDER]

``recipe`` trains whole models, which takes longer than all others together: all without any leaves it out.
``--stage run`` writes only the numbers, as JSON, and needs no matplotlib; ``--stage draw`` makes tables and
figures of the numbers that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mnemosyne.training.experiments import (
    chaos,
    depth,
    forgetting,
    memora,
    momentum,
    moneta,
    outliers,
    recipe,
    report,
)
from mnemosyne.training.experiments.report import Panel, Result, Table

EXPERIMENTS: dict[str, tuple[dict[str, Any], Callable[..., tuple[list[Table], list[Panel]]]]] = {
    module.__name__.rpartition(".")[2]: (module.SETTINGS, module.run)
    for module in (depth, momentum, forgetting, outliers, memora, moneta, chaos, recipe)
}
"""Name -> settings by size, and what runs one on a device."""


def run(name: str, size: str, device: torch.device, *runs: Path) -> Result:
    settings, experiment = EXPERIMENTS[name]
    tables, panels = experiment(settings[size], device, *runs)
    return Result(
        name=name,
        size=size,
        setting=dataclasses.asdict(settings[size]),
        machine=f"{device.type}, torch {torch.__version__.partition('+')[0]}",
        tables=tables,
        panels=panels,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="mnemosyne.training.experiments", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--size", choices=("tiny", "small", "full"), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"))
    parser.add_argument("--stage", choices=("all", "run", "draw"), default="all")
    given = parser.parse_args()
    if unknown := set(given.names) - set(EXPERIMENTS):
        parser.error(f"there is no experiment {', '.join(sorted(unknown))}")
    for name in given.names or [name for name in EXPERIMENTS if name != "recipe"]:
        if given.stage != "draw":
            started = time.perf_counter()
            runs = [given.out / "recipe.jsonl"] if name == "recipe" else []
            report.save(run(name, given.size, torch.device(given.device), *runs), given.out)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        if given.stage != "run":
            from mnemosyne.training.experiments import figures  # only here: a GPU machine may lack matplotlib

            result = report.load(given.out / f"{name}.json")
            text = report.markdown(result)
            print(text, flush=True)
            report.fill(given.out / f"{name}.md", text)
            figures.draw(result, given.out)


if __name__ == "__main__":
    main()
