"""The demo's own judgement: what counts as right, and which result makes it fail."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LOADTESTS = Path(__file__).resolve().parents[2] / "loadtests"
GOOD = {"identical": True, "promised": 24, "right": 30, "control_right": 2}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(LOADTESTS))
    demo, questions, server = map(importlib.import_module, ("demo", "demo_questions", "demo_server"))
    return demo, questions, server


def failures(demo: ModuleType, engine_gone: bool = True, distance: int = 900, **changes: Any) -> list[str]:
    found: list[str] = demo.failures(GOOD | changes, engine_gone, distance, 512)
    return found


def test_a_good_run_passes(modules: tuple[ModuleType, ...]) -> None:
    assert failures(modules[0]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"identical": False},
        {"right": 23},
        {"control_right": 30},
        {"engine_gone": False},
        {"distance": 512},
    ],
)
def test_each_broken_promise_fails_it(modules: tuple[ModuleType, ...], changes: dict[str, Any]) -> None:
    assert len(failures(modules[0], **changes)) == 1


def test_only_the_true_word_at_the_end_is_right(modules: tuple[ModuleType, ...]) -> None:
    questions = modules[1]
    fact = questions.make_facts(1, 1)[0]
    assert questions.is_right(fact, f" The {fact.relation} of the {fact.entity} is {fact.answer}.\n")
    assert questions.is_right(fact, fact.answer.upper())
    for wrong in (
        "",
        " ",
        "something",
        f"{fact.answer} or something",
        f"{fact.answer}s",
        f"not{fact.answer}",
    ):
        assert not questions.is_right(fact, wrong)


def test_the_text_is_long_repeatable_and_holds_each_fact_once(modules: tuple[ModuleType, ...]) -> None:
    demo, questions, _ = modules
    hidden = questions.hidden_facts(7, demo.QUESTIONS, demo.MIN_BYTES)
    assert hidden.text == questions.hidden_facts(7, demo.QUESTIONS, demo.MIN_BYTES).text
    assert hidden.text != questions.hidden_facts(8, demo.QUESTIONS, demo.MIN_BYTES).text
    assert len(hidden.text.encode()) >= 600_000
    places = [hidden.text.index(fact.sentence) / len(hidden.text) for fact in hidden.facts]
    assert all(hidden.text.count(fact.sentence) == 1 for fact in hidden.facts)
    # Evenly: one in each fortieth, to within the length of a paragraph.
    assert all(abs(place - (i + 0.5) / demo.QUESTIONS) < 1 / demo.QUESTIONS for i, place in enumerate(places))


def test_the_least_promise_holds_whatever_the_checkpoint_says(
    modules: tuple[ModuleType, ...], tmp_path: Path
) -> None:
    for text, promise in (
        ("{}", 24),
        ('{"promise": {"demo_right": 3}}', 24),
        ('{"promise": {"demo_right": 33}}', 33),
    ):
        (tmp_path / "prompt.json").write_text(text, encoding="utf-8")
        assert modules[1].promised(tmp_path) == promise


def test_a_child_that_outlives_its_killed_parent_is_seen(
    modules: tuple[ModuleType, ...], tmp_path: Path
) -> None:
    server = modules[2].ServerProcess(tmp_path)
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep({})'])"
    code = f"import subprocess, sys, time; {child}"
    for seconds, gone in ((0.2, True), (60, False)):
        parent = code.format(seconds) + "; time.sleep(60)"
        server.process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
        time.sleep(0.5)
        assert server.kill(grace_seconds=1.0) is gone
