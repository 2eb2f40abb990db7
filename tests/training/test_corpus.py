from __future__ import annotations

import lzma
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mnemosyne.training import corpus
from mnemosyne.training.facts import DEMO_MODULES


def test_pieces_encode_as_the_whole_does(tokenizer: Tokenizer) -> None:
    text = "One sentence. Another one!\n\nA list:\n  * first (yes).\n  * second.\n\n\nEnd"
    stream = corpus.encode(tokenizer, text, corpus.DOCS_END)
    assert stream.tokens.tolist() == tokenizer.encode(text).ids
    assert stream.ends[-1] == len(stream.tokens) and (stream.ends[1:] > stream.ends[:-1]).all()


def test_the_end_of_the_books_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {i}.\n" for i in range(1000))
    (tmp_path / corpus.BOOKS).write_bytes(lzma.compress(text.encode()))
    train, held_out = corpus.books(corpus.data_folder(str(tmp_path)))
    assert train + held_out == text and 0.18 < len(held_out) / len(text) < 0.19


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"books-train.*--data"):
        corpus.data_folder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"docs_tokens.*mnemosyne\.training\.corpus"):
        corpus.load(tmp_path, "docs")


def test_the_demos_text_is_no_training_text() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    sources = {path.relative_to(library).as_posix() for path in corpus.standard_sources()}
    assert {"heapq.py", "shutil.py"} <= sources
    demo = {f"{name}{end}" for name in DEMO_MODULES for end in (".py", "/__init__.py")}
    assert not sources & {"pydoc_data/topics.py", *demo}


def test_the_standard_librarys_documentation_comes_in_whole_modules() -> None:
    short, long = corpus.standard_docs(20_000), corpus.standard_docs(60_000)
    assert 20_000 <= len(short) < len(long) and long.startswith(short.rstrip("\n"))
