"""The table of what mattered, at a size that takes no time: its changes, its rows, its judging, and the file
that survives being cut off."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mnemosyne.kernels.gates import Gates
from mnemosyne.training import corpus
from mnemosyne.training.babilong.stories import written
from mnemosyne.training.experiments import __main__ as experiments
from mnemosyne.training.experiments import figures, recipe, recipe_rows, recipe_run, report
from mnemosyne.training.experiments.recipe import Sources
from mnemosyne.training.experiments.recipe_changes import BASE, SETTINGS, Change, changes
from mnemosyne.training.feed import Arrays
from mnemosyne.training.train import build

from .babilong.test_stories import moves, told

CPU = torch.device("cpu")
TINY = SETTINGS["tiny"]
ROOT = Path(__file__).resolve().parents[2]
ALL = {change.name: change for change in changes(TINY)}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the settings have the tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, data: Path, tokenizer: Tokenizer) -> Sources:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "babi").mkdir()
    (folder / "babi" / "qa1_moves.txt").write_text(written(told(moves(200))), encoding="utf-8")
    for name in ("books", "docs"):
        for kind in ("tokens", "ends"):
            (folder / f"{name}_{kind}.npy").symlink_to(data / f"{name}_{kind}.npy")
    held_out = corpus.encode(tokenizer, "Nothing of this was ever read before. " * 1000, corpus.BOOK_END)
    np.save(folder / "held_out_tokens.npy", held_out.tokens)
    np.save(folder / "held_out_ends.npy", held_out.ends)
    return Sources(folder, folder / "babi", folder / "runs.jsonl")


@pytest.fixture
def place(sources: Sources, tmp_path: Path) -> Sources:
    return dataclasses.replace(sources, runs=tmp_path / "recipe.jsonl")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads: processes take seconds to start."""
    monkeypatch.setattr(recipe, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))


def few(monkeypatch: pytest.MonkeyPatch, *chosen: Change) -> None:
    monkeypatch.setattr(recipe, "changes", lambda setting: list(chosen))


def names(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text().splitlines() if line.endswith("}")]


def test_every_change_is_one_and_changes_something(sources: Sources) -> None:
    made = {name: vars(sources.settings(change, TINY)) for name, change in ALL.items()}
    assert len(made) == len(changes(TINY))
    for name, settings in made.items():
        needed = re.search(r"\[(.+)\]", name)
        other = made[needed[1] if needed else BASE]
        differing = [key for key in settings if settings[key] != other[key]]
        if name.startswith("Memora"):
            differing.remove("theta_max")
        assert len(differing) == (name != BASE), name
    assert len({sources.settings(c, TINY).model.to_json() for c in ALL.values()}) == len(ALL) - 5
    full = recipe.SETTINGS["full"]
    for change in changes(full):
        settings = sources.settings(change, full)
        assert settings.model and settings.reach <= full.far, change.name


def test_every_change_trains_and_is_judged(sources: Sources) -> None:
    base = sources.settings(ALL[BASE], TINY)
    with ThreadPoolExecutor(1) as threads:
        rows = recipe_rows.trained(threads, base, 2)
        judged = recipe_rows.judged(threads, base, [(16, 128, 2.0), (8, 256, 4.0)])
    for name, change in ALL.items():
        found = recipe_run.run(sources.settings(change, TINY), CPU, rows, judged, TINY.far)
        assert len(found["curve"]) == 2 and found["lost"] == 0 and found["speed"] > 0, name
        for one in found["judged"]:
            assert one["finite"] and 0 < one["far"] < one["asked"] and 7 < one["text"] < 10, name
            assert one["written"] > 0 and 0 < one["theta"] < 1, name


def test_rows_depend_on_the_seed_and_not_on_the_workers(sources: Sources) -> None:
    settings = sources.settings(ALL[BASE], TINY)
    other = sources.settings(ALL[f"{BASE}, seed 1"], TINY)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(3) as three:
        first, again, second = (
            recipe_rows.trained(*given, 30) for given in ((one, settings), (three, settings), (one, other))
        )
    assert len(first) == len(again) == 30
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0].tokens, first[25].tokens)


def test_runs_are_judged_by_what_no_row_has_told(
    sources: Sources, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Spied(recipe_rows.StoryRows):
        def __init__(self, *given: Any) -> None:
            seen.append(given[-1])
            super().__init__(*given)

    monkeypatch.setattr(recipe_rows, "StoryRows", Spied)
    settings = sources.settings(ALL[BASE], TINY)
    with ThreadPoolExecutor(1) as threads:
        ((batch,),) = recipe_rows.judged(threads, settings, [(16, 256, 2.0)])
    ((stories,),) = seen
    assert stories and all(story.split == "validation" for story in stories)
    assert batch.tokens.shape == (16, 256)
    assert "Nothing of this was ever read before." in tokenizer.decode(batch.tokens[0].tolist())


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
    """Answers at 4-5 (far), 7 (near) in row 0, 3 (far), 4 (far) beside it in row 1: of another task."""
    tokens = np.arange(20).reshape(2, 10) % 9 + 1
    at = np.array([[3, 4, 6, 1], [2, 5, 6, 1]])
    target = np.take_along_axis(tokens, at + 1, 1)
    fact = np.array([[0, 0, 1, 2, 0, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0, 0, 0]], np.uint8)
    answer = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.float32)
    text = np.array([[0, 0, 0, 1], [0, 0, 0, 1]], np.float32)
    distance = np.array([[9, 9, 1, 0], [9, 9, 0, 0]], np.int32)
    task = np.array([[1, 1, 1, 0], [1, 2, 0, 0]], np.uint8)
    return Arrays(tokens, fact, at, target, answer, text, distance, task)


def test_an_answer_is_right_when_all_of_it_is() -> None:
    batch = batch_of_answers()
    theta = torch.zeros(2, 10)
    theta[0, 3], theta[1, 1], theta[0, 5:9] = 0.5, 0.25, 0.1
    right = recipe_run.judge(Told([], theta), [batch], far=4)  # type: ignore[arg-type]
    assert (right.asked, right.far, right.right_far) == (4, 3, 3)
    assert right.tasks == {"qa1": 1.0, "qa2": 1.0} and right.finite
    assert right.written == pytest.approx(4 / 16) and right.theta == pytest.approx(0.75)
    assert right.text == pytest.approx(0.0, abs=1e-6)
    wrong = recipe_run.judge(Told([(0, 5), (0, 7)], theta), [batch], far=4)  # type: ignore[arg-type]
    assert (wrong.right_far, wrong.tasks) == (2, {"qa1": 0.5, "qa2": 1.0})
    twice = recipe_run.judge(Told([], theta * torch.nan), [batch, batch], far=4)  # type: ignore[arg-type]
    assert (twice.asked, twice.floor) == (8, pytest.approx(4 / 6))


def test_queries_that_start_unlike_keys(sources: Sources) -> None:
    for name, alike in ((BASE, True), ("queries start unlike keys", False)):
        model = build(sources.settings(ALL[name], TINY), CPU)
        keys = [block.mixer.memory.project.weight.clone() for block in model.blocks]
        if not alike:
            recipe_run.part(model)
        for block, before in zip(model.blocks, keys, strict=True):
            weight, d = block.mixer.memory.project.weight, TINY.dim
            assert torch.equal(weight[:d], weight[d : 2 * d]) == alike
            assert torch.equal(weight[d:], before[d:])


def test_what_was_cut_off_goes_on(place: Sources, pool: None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Change("broken", "rule", {"rule": "nonsense"})
    chosen = [ALL[BASE], ALL["LMM"], broken, ALL["no momentum"]]
    few(monkeypatch, *chosen)
    tables, _ = recipe.run(TINY, CPU, dataclasses.replace(place, part=(1, 2)))
    assert names(place.runs) == [BASE]
    assert [row[1] for row in tables[0].rows[1:4]] == ["not run"] * 3
    recipe.run(TINY, CPU, dataclasses.replace(place, part=(2, 2)))
    assert names(place.runs) == [BASE, "LMM", "no momentum"]
    text = place.runs.read_text()
    place.runs.write_text(text[:-40])  # as a process that was killed leaves it
    tables, panels = recipe.run(TINY, CPU, place)
    assert names(place.runs) == [BASE, "LMM", "no momentum"]
    assert text.splitlines()[:2] == place.runs.read_text().splitlines()[:2]
    assert [row[1] == "not run" for row in tables[0].rows[:4]] == [False, False, True, False]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    few(monkeypatch, *(change for change in chosen if change is not broken))
    monkeypatch.setattr(recipe, "made", None)
    recipe.run(TINY, CPU, place)  # makes nothing
    with pytest.raises(TypeError):
        recipe.run(dataclasses.replace(TINY, steps=4), CPU, place)  # another setting's runs


def test_a_run_that_is_not_finite_is_in_the_table(
    place: Sources, pool: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few(monkeypatch, ALL[BASE], Change("too fast", "gates", {"lr": 1e30}))
    result = experiments.run("recipe", "tiny", CPU, place)
    finite, lost = (row[1:] for row in result.tables[0].rows[:2])
    assert lost[:3] == ["not finite", "not finite", "-"] and lost[-1] == "2 of 3"
    assert "not finite" not in finite and finite[-1] == "0 of 3"
    report.save(result, tmp_path)
    again = report.load(tmp_path / "recipe.json")
    assert report.markdown(again) == report.markdown(result)
    assert figures.draw(again, tmp_path).read_text().startswith("<?xml")


def test_the_runner_needs_the_files_and_makes_rows_in_processes(
    place: Sources, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch, ALL[BASE])
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"recipe": experiments.EXPERIMENTS["recipe"]})
    command = ["experiments", "--size", "tiny", "--out", str(place.runs.parent), "--stage", "run"]
    monkeypatch.setattr(sys, "argv", command)
    experiments.main()  # all that there is to be made without files
    assert not place.runs.exists()
    monkeypatch.setattr(sys, "argv", [*command, "recipe"])
    with pytest.raises(SystemExit):
        experiments.main()
    assert "--babi" in capsys.readouterr().err
    files = ["--data", str(place.data), "--babi", str(place.babi)]
    for part in ("2/1", "half"):
        monkeypatch.setattr(sys, "argv", [*command, *files, "--part", part])
        with pytest.raises(SystemExit):
            experiments.main()
    monkeypatch.setattr(sys, "argv", [*command, *files])
    experiments.main()
    assert names(place.runs) == [BASE]
    assert (place.runs.parent / "recipe.json").is_file()
