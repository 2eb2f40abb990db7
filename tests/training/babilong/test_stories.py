"""Stories whole: their splits, the same told of others, and back into bAbI's format."""

from __future__ import annotations

import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training import corpus
from mnemosyne.training.babilong.stories import Names, Story, load_stories, stories_of, written
from mnemosyne.training.babilong.tasks import Task, load_task, parse
from mnemosyne.training.babilong.validation import FIRST_BOOK, write

from .conftest import STORIES


def told(text: str, number: int = 1) -> list[Story]:
    return stories_of(Task(number, "", "", tuple(parse(text, "qa"))))


def moves(stories: int) -> str:
    """Different stories of qa1's kind."""
    rng = random.Random(5)
    persons, places = (
        ("Mary", "John", "Sandra", "Daniel"),
        ("office", "garden", "kitchen", "bathroom", "hallway"),
    )
    lines = []
    for _ in range(stories):
        where: dict[str, tuple[str, int]] = {}
        for n in range(1, 10):
            if n % 3:
                who, place = rng.choice(persons), rng.choice(places)
                where[who] = place, n
                lines.append(f"{n} {who} went to the {place}.")
            else:
                who = rng.choice(list(where))
                lines.append(f"{n} Where is {who}? \t{where[who][0]}\t{where[who][1]}")
    return "\n".join(lines) + "\n"


def test_a_story_has_all_of_its_questions() -> None:
    first, second = told(STORIES)
    assert [len(first.facts), len(first.questions), len(second.facts)] == [3, 3, 2]
    assert first.until(2) == Story(1, first.facts[:2], first.questions[:1])
    assert written([first, second]).replace(" \t", "\t") == STORIES.replace(" \t", "\t")
    assert parse(written([first, second]), "qa") == parse(STORIES, "qa")


def test_a_story_is_in_one_split_wherever_it_stands(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    text = moves(400)
    (tmp_path / "a" / "qa1_x.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b" / "qa1_y.txt").write_text(written(told(text)[::-1]), encoding="utf-8")
    (train,), (held,) = (
        load_stories(tmp_path / "a", [1], "train"),
        load_stories(tmp_path / "a", [1], "validation"),
    )
    assert len(train) + len(held) == 400 and 25 <= len(held) <= 65
    assert not {story.facts for story in train} & {story.facts for story in held}
    (again,) = load_stories(tmp_path / "b", [1], "validation")
    assert {story.facts for story in again} == {story.facts for story in held}


def test_a_task_that_is_named_twice_is_told_twice_as_often(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"qa{number}_x.txt").write_text(moves(40 + number), encoding="utf-8")
    first, second, again = load_stories(tmp_path, [1, 2, 1], "train")
    assert again == first != second and {story.task for story in second} == {2}


def test_a_story_told_of_others_is_the_same_story() -> None:
    _, carried = told(STORIES)
    names = Names(random.Random(1))
    seen = []
    for keep in (True, False, False):
        other = names.told_of_others(carried, keep)
        assert other is not None
        (who,) = {fact.split()[0] for fact in other.facts}
        first, second = (fact.split()[3] for fact in other.facts)
        assert other.facts == (f"{who} took the {first} there.", f"{who} took the {second} there.")
        (question,) = other.questions
        assert (question.question, question.answer) == (f"What is {who} carrying?", f"{first},{second}")
        assert question.facts == other.facts and question.supporting == (0, 1)
        seen += [who, first, second]
    assert seen[:3] == ["Sandra", "milk", "apple"] and len(set(seen)) == 9
    assert names.told_of_others(carried, keep=True) is None  # Sandra is taken


def test_places_are_told_apart_where_a_task_is_about_them() -> None:
    text = "1 The office is north of the kitchen.\n2 What is north of the kitchen?\toffice\t1\n"
    names = Names(random.Random(1))
    (places,), (persons,) = (
        told(text, 4),
        told("1 Mary went to the office.\n2 Where is Mary?\toffice\t1\n", 1),
    )
    kept, other = names.told_of_others(places, True), names.told_of_others(places, False)
    assert kept == places and other is not None
    assert other.questions[0].answer == other.facts[0].split()[1] not in ("office", "kitchen")
    moved = names.told_of_others(persons, False)
    assert moved is not None and moved.questions[0].answer == "office"  # persons share the places
    for _ in range(6):
        assert names.told_of_others(places, False) is not None
    assert names.told_of_others(places, False) is None  # 16 places are used up


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as training expects it, with the held-out books at the end of the text."""
    folder = tmp_path / "data"
    (folder / "babi").mkdir(parents=True)
    (folder / "babi" / "qa1_x_train.txt").write_text(moves(400), encoding="utf-8")
    books = "A line of the books that are read.\n" * 3000 + FIRST_BOOK + "Held out.\n" * 300
    (folder / corpus.BOOKS).write_bytes(lzma.compress(books.encode()))
    return folder


def test_the_validation_split_as_files(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mnemosyne.training.babilong.validation", "--tasks", "1"]
    done = subprocess.run([*command, "--data", str(data), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    task = load_task(out / "babi", 1)
    assert json.loads(done.stdout)["qa1"] == len(task.questions) > 20
    (held,), (train,) = (load_stories(data / "babi", [1], split) for split in ("validation", "train"))
    assert [story.facts for story in stories_of(task)] == [story.facts for story in held]
    assert not {story.facts for story in stories_of(task)} & {story.facts for story in train}
    text = (out / "books" / "validation.txt").read_text(encoding="utf-8")
    assert text == FIRST_BOOK + "Held out.\n" * 300 and FIRST_BOOK not in corpus.books(data)[0]


def test_other_books_are_refused(data: Path, tmp_path: Path) -> None:
    for books in ("Other lines.\n" * 4000, "Read.\n" + FIRST_BOOK + "Read.\n" * 4000 + FIRST_BOOK):
        (data / corpus.BOOKS).write_bytes(lzma.compress(books.encode()))
        with pytest.raises(ConfigError, match="other books than this split was made for"):
            write(data, [1], tmp_path / "out")
