"""Plain text from files, compressed or not, for what reads books. Owns which files count; knows no sentence
and no token."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

from mnemosyne.engine.errors import ConfigError

ENDINGS = (".txt", ".txt.xz")


@dataclass(frozen=True)
class Book:
    name: str
    """The file's name."""
    text: str


def read_text(path: Path) -> str:
    """A UTF-8 file, unpacked where its name ends in ``.xz``. Raises ConfigError where it can't be read."""
    try:
        data = path.read_bytes()
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error


def read_books(path: Path) -> list[Book]:
    """The file, or every ``.txt`` and ``.txt.xz`` of the folder by name.

    Raises ConfigError, which says what to put where, for nothing to read.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS) and file.is_file())
    else:
        files = [path] if path.is_file() else []
    books = [Book(file.name, read_text(file)) for file in files]
    if not any(book.text.strip() for book in books):
        raise ConfigError(
            f"there is no book text at {path}: put plain UTF-8 text there, as a file or as a folder of .txt "
            "or .txt.xz files, one paragraph to a line (books of Project Gutenberg without their headers do)"
        )
    return books
