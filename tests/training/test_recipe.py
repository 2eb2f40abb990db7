"""The table of what mattered, at a size that takes no time: its changes, its rows, its judging, and the file
that survives being cut off."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.gates import Gates
from mnemosyne.training.experiments import __main__ as experiments
from mnemosyne.training.experiments import figures, recipe, recipe_rows, recipe_run, recipe_tables, report
from mnemosyne.training.experiments.recipe_changes import BASE, SETTINGS, Change, changes
from mnemosyne.training.facts import RELATIONS, demo_text, split_of
from mnemosyne.training.feed import Arrays
from mnemosyne.training.train import build

CPU = torch.device("cpu")
TINY = SETTINGS["tiny"]
ROOT = Path(__file__).resolve().parents[2]
ALL = {change.name: change for change in changes(TINY)}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the settings have the tokenizer


@pytest.fixture(scope="module")
def maker() -> recipe_rows.Maker:
    return recipe_rows.prepare(TINY.text)


@pytest.fixture(autouse=True)
def prepared_once(maker: recipe_rows.Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_rows, "prepare", lambda text: maker)


def settings_of(name: str) -> recipe_run.RunSettings:
    return ALL[name].applied(TINY, 6144)


def few(monkeypatch: pytest.MonkeyPatch, *chosen: Change) -> None:
    monkeypatch.setattr(recipe, "changes", lambda setting: list(chosen))


def names(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text().splitlines() if line.endswith("}")]


def test_every_change_is_one_and_changes_something() -> None:
    made = {name: vars(settings_of(name)) for name in ALL}
    assert len(made) == len(changes(TINY))
    for name, settings in made.items():
        needed = re.search(r"\[(.+)\]", name)
        other = made[needed[1] if needed else BASE]
        differing = [key for key in settings if settings[key] != other[key]]
        if name.startswith("Memora"):
            differing.remove("theta_max")
        assert len(differing) == (name != BASE), name
    assert len({settings_of(name).model.to_json() for name in ALL}) == len(ALL) - 6
    full = recipe.SETTINGS["full"]
    for change in changes(full):
        settings = change.applied(full, 6144)
        assert settings.model and settings.reach <= full.far, change.name


def test_every_change_trains_and_is_judged(maker: recipe_rows.Maker) -> None:
    rows = maker.trained(0, 2, 128, 128, 2.0)
    judged = [maker.judged(6, 128, 2.0), maker.judged(2, 256, 4.0)]
    for name in ALL:
        found = recipe_run.run(settings_of(name), CPU, rows, judged, TINY.far)
        assert len(found["curve"]) == 2 and found["lost"] == 0 and found["speed"] > 0, name
        for one in found["judged"]:
            assert one["finite"] and one["far"] > 0 and 7 < one["text"] < 10, name
            assert one["written"] > 0 and 0 < one["theta"] < 1, name


def test_rows_depend_on_the_seed_alone(maker: recipe_rows.Maker) -> None:
    first, again, second = (maker.trained(seed, 3, 256, 128, 2.0) for seed in (0, 0, 1))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))


def test_runs_are_judged_by_what_no_row_has_told(maker: recipe_rows.Maker) -> None:
    """Neither by its facts nor by its text."""
    told = re.compile(r"(?:[Tt]he|that the) ([a-z ]+) of the (\w+ \w+) is")
    learned, judged = maker.trained(0, 4, 1024, 128, 2.0), maker.judged(40, 128, 2.0)
    assert [batch.tokens.shape for batch in judged] == [(40, 128)]
    for batches, split in ((learned, "train"), (judged, "demo")):
        text = "\n".join(maker.tokenizer.decode(row.tolist()) for batch in batches for row in batch.tokens)
        names = {relation.name for relation in RELATIONS}
        found = [(entity, name) for name, entity in told.findall(text) if name in names]
        assert len(found) > 50 and {split_of(*one) for one in found} == {split}
    modules = demo_text(TINY.text)[:300]
    assert modules in maker.tokenizer.decode(maker.held_out.tokens[:300].tolist())
    assert modules not in maker.tokenizer.decode(maker.learned.tokens.tolist())


class Told:
    """A model that says at every place what comes next, but for ``wrong`` (row, place of the token)."""

    config = SimpleNamespace(memory=SimpleNamespace(theta_max=0.5))
    device = CPU

    def __init__(self, wrong: list[tuple[int, int]], theta: Tensor) -> None:
        self.wrong, self.theta = wrong, theta

    def eval(self) -> None:
        pass

    def __call__(self, tokens: Tensor) -> tuple[Tensor, list[Gates]]:
        following = tokens.roll(-1, 1)
        for row, place in self.wrong:
            following[row, place - 1] = 0
        one = Gates(self.theta[:, None, None].expand(-1, 2, 1, -1))
        return 100 * torch.nn.functional.one_hot(following, 10).float(), [Gates(one.theta * 0), one]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def batch_of_answers() -> Arrays:
    """Answers at 4-5 (far), 7 (near) in row 0, 3 (far), 6 (near) in row 1."""
    tokens = np.arange(20).reshape(2, 10) % 9 + 1
    at = np.array([[3, 4, 6, 1], [2, 5, 6, 1]])
    target = np.take_along_axis(tokens, at + 1, 1)
    fact = np.array([[0, 0, 1, 2, 0, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0, 0, 0]], np.uint8)
    answer = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.float32)
    text = np.array([[0, 0, 0, 1], [0, 0, 0, 1]], np.float32)
    distance = np.array([[9, 9, 1, 0], [9, 2, 0, 0]], np.int32)
    return Arrays(tokens, fact, at, target, answer, text, distance, 0 * text)


def test_an_answer_is_right_when_all_of_it_is() -> None:
    batch = batch_of_answers()
    theta = torch.zeros(2, 10)
    theta[0, 3], theta[1, 1], theta[0, 5:9] = 0.5, 0.25, 0.1
    right = recipe_run.judge(Told([], theta), [batch], far=4)  # type: ignore[arg-type]
    assert (right.far, right.right_far, right.finite) == (2, 2, True)
    assert right.written == pytest.approx(4 / 16) and right.theta == pytest.approx(0.75)
    assert right.text == pytest.approx(0.0, abs=1e-6)
    wrong = recipe_run.judge(Told([(0, 5), (0, 7)], theta), [batch], far=4)  # type: ignore[arg-type]
    assert (wrong.far, wrong.right_far) == (2, 1)
    twice = recipe_run.judge(Told([], theta), [batch, batch], far=1)  # type: ignore[arg-type]
    assert (twice.far, twice.right_far) == (6, 6)


def test_queries_that_start_unlike_keys() -> None:
    for name, alike in ((BASE, True), ("queries start unlike keys", False)):
        model = build(settings_of(name), CPU)
        keys = [block.mixer.memory.project.weight.clone() for block in model.blocks]
        if not alike:
            recipe_run.part(model)
        for block, before in zip(model.blocks, keys, strict=True):
            weight, d = block.mixer.memory.project.weight, TINY.dim
            assert torch.equal(weight[:d], weight[d : 2 * d]) == alike
            assert torch.equal(weight[d:], before[d:])


def test_what_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "recipe.jsonl"
    broken = Change("broken", "rule", {"rule": "nonsense"})
    chosen = [ALL[BASE], broken, ALL["LMM"], ALL["no momentum"]]
    few(monkeypatch, *chosen)
    tables, _ = recipe.run(TINY, CPU, runs)
    assert names(runs) == [BASE, "LMM", "no momentum"]
    assert [row[1] == "not run" for row in tables[0].rows[:4]] == [False, True, False, False]
    text = runs.read_text()
    runs.write_text(text[:-40])  # as a process that was killed leaves it
    tables, _ = recipe.run(TINY, CPU, runs)
    assert names(runs) == [BASE, "LMM", "no momentum"]
    assert text.splitlines()[:2] == runs.read_text().splitlines()[:2]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    few(monkeypatch, *(change for change in chosen if change is not broken))
    monkeypatch.setattr(recipe, "made", None)
    recipe.run(TINY, CPU, runs)  # makes nothing
    with pytest.raises(TypeError):
        recipe.run(dataclasses.replace(TINY, steps=4), CPU, runs)  # another setting's runs


def test_points_are_from_the_mean_of_the_bases_seeds() -> None:
    def row(*right: int) -> dict[str, Any]:
        judged = [
            {"far": 200, "right_far": n, "finite": n > 0, "text": 3.0, "written": 0.01, "theta": 0.5}
            for n in right
        ]
        return {"judged": judged, "speed": 1.0, "lost": 0, "curve": [0.0], "device": "a CPU"}

    there = {BASE: row(180, 100), f"{BASE}, seed 1": row(184, 110), "LMM": row(186, 75), "MAL": row(0, 0)}
    (table,) = recipe_tables.tables(TINY, list(ALL.values()), there)
    cells = {cells[0]: cells[1:5] for cells in table.rows}
    assert cells[BASE] == ["90.0%", "-1.0", "50.0%", "-2.5"]
    assert cells["LMM"] == ["93.0%", "+2.0", "37.5%", "-15.0"]
    assert cells["MAL"] == ["not finite", "-", "not finite", "-"]
    assert cells["MAC"] == ["not run", "-", "-", "-"]
    assert list(cells.values())[-1] == ["-", "1.4", "-", "3.5"]


def test_a_run_that_is_not_finite_is_in_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few(monkeypatch, ALL[BASE], Change("too fast", "gates", {"lr": 1e30}))
    result = experiments.run("recipe", "tiny", CPU, tmp_path / "recipe.jsonl")
    finite, lost = (row[1:] for row in result.tables[0].rows[:2])
    assert lost[:5] == ["not finite", "-", "not finite", "-", "-"] and lost[-1] == "2 of 3"
    assert "not finite" not in finite and finite[-1] == "0 of 3"
    report.save(result, tmp_path)
    again = report.load(tmp_path / "recipe.json")
    assert report.markdown(again) == report.markdown(result)
    assert figures.draw(again, tmp_path).read_text().startswith("<?xml")


def test_it_runs_where_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few(monkeypatch, ALL[BASE])
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"recipe": experiments.EXPERIMENTS["recipe"]})
    command = ["experiments", "--size", "tiny", "--out", str(tmp_path), "--stage", "run"]
    monkeypatch.setattr(sys, "argv", command)
    experiments.main()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", [*command, "recipe"])
    experiments.main()
    assert names(tmp_path / "recipe.jsonl") == [BASE]
    assert (tmp_path / "recipe.json").is_file()
