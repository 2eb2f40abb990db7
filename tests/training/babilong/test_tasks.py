"""What a bAbI file says, and what isn't one."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training.babilong.tasks import Question, load_task, parse, parse_numbers
from mnemosyne.training.books import read_books

from .conftest import STORIES


def test_each_question_has_the_facts_before_it_and_no_other_question() -> None:
    mary, john, later = "Mary moved to the garden.", "John went to the office.", "Mary went to the kitchen."
    carried = "Sandra took the milk there.", "Sandra took the apple there."
    assert parse(STORIES, "qa") == [
        Question(0, (mary, john), "Where is Mary?", "garden", (0,)),
        Question(0, (mary, john, later), "Where is Mary?", "kitchen", (2,)),
        Question(0, (mary, john, later), "Where is John?", "office", (1,)),
        Question(1, carried, "What is Sandra carrying?", "milk,apple", (0, 1)),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Mary moved.\n", "line 1 isn't bAbI"),
        ("2 Mary moved.\n", "line 1 isn't bAbI"),
        ("1 Mary moved.\n2 Where? \toffice\t7\n", "line 2 rests on a fact that isn't there"),
        ("1 Mary moved.\n2 Where? \toffice\t2\n", "line 2 rests on a fact that isn't there"),
        ("1 Where? \toffice\n", "line 1 asks without a fact"),
        ("1 Mary moved.\n2 Where? \t\t1\n", "line 2 asks without"),
    ],
)
def test_what_isnt_babi_is_named_by_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"qa9, {said}"):
        parse(text, "qa9")


def test_a_folders_tasks(babi: Path) -> None:
    task = load_task(babi, 1)
    assert (task.name, task.answers) == ("qa1", {"garden", "kitchen", "office", "milk,apple"})
    assert task.most_frequent == 0.25
    # The test half is taken where there are two; packed files are the same.
    (babi / "qa1_single-supporting-fact_train.txt").write_text("1 No.\n", encoding="utf-8")
    (babi / "qa10_x_train.txt.xz").write_bytes(lzma.compress(STORIES.encode()))
    assert load_task(babi, 1) == task
    assert load_task(babi, 10).questions == task.questions
    (babi / "qa10_y.txt").write_text(STORIES, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"several files of task 10.*qa10_x_train\.txt\.xz, qa10_y\.txt"):
        load_task(babi, 10)
    (babi / "qa3_none.txt").write_text("1 No question.\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="asks no question"):
        load_task(babi, 3)


def test_data_that_isnt_there_is_named_with_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no bAbI task 2 in .*put the files of the task there.*qa2_"):
        load_task(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"no book text at .*plain UTF-8 text"):
        read_books(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"can't read .*latin\.txt"):
        read_books(tmp_path)
    (tmp_path / "latin.txt").rename(tmp_path / "other.md")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress("Zweites Büch.".encode()))
    (tmp_path / "a.txt").write_text("First.", encoding="utf-8")
    assert [(b.name, b.text) for b in read_books(tmp_path)] == [
        ("a.txt", "First."),
        ("b.txt.xz", "Zweites Büch."),
    ]


def test_tasks_by_number() -> None:
    assert parse_numbers("1-3, 7,2") == [1, 2, 3, 7]
    for wrong in ("0", "11", "3-1", "qa1", "", "1,,2"):
        with pytest.raises(ConfigError, match="numbers from 1 to 10"):
            parse_numbers(wrong)
