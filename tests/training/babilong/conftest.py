"""Small tasks in bAbI's format and a little book, both made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnemosyne.training.babilong.haystack import Haystack, make_haystack
from mnemosyne.training.books import Book

STORIES = """\
1 Mary moved to the garden.
2 John went to the office.
3 Where is Mary? \tgarden\t1
4 Mary went to the kitchen.
5 Where is Mary? \tkitchen\t4
6 Where is John? \toffice\t2
1 Sandra took the milk there.
2 Sandra took the apple there.
3 What is Sandra carrying? \tmilk,apple\t1 2
"""


def book(sentences: int = 60) -> str:
    """Every sentence is told apart by its number; each third begins a line, some are too short to be used."""
    told = [
        f"The {i} travellers of the night came slowly down to the harbour at\u00a0 last."
        for i in range(sentences)
    ]
    return "".join(f"{s} Yes. " if i % 3 else f"\n{s} " for i, s in enumerate(told))


@pytest.fixture(scope="session")
def haystack(tokenizer) -> Haystack:
    return make_haystack([Book("a", book())], tokenizer)


@pytest.fixture
def babi(tmp_path: Path) -> Path:
    folder = tmp_path / "babi"
    folder.mkdir()
    (folder / "qa1_single-supporting-fact_test.txt").write_text(STORIES, encoding="utf-8")
    return folder
