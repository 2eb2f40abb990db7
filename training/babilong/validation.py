"""The validation split as files that ``mnemosyne eval`` reads: stories and books that no training row has.

python -m mnemosyne.training.babilong.validation --data ../shared/data --out build/validation
mnemosyne eval babilong --babi build/validation/babi --books build/validation/books ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training import corpus
from mnemosyne.training.babilong.stories import load_stories, written
from mnemosyne.training.babilong.tasks import parse_numbers

FIRST_BOOK = '[Picture: "Oh, sir! can you be Peter?"]\n'
"""The line that the first of the held-out books begins with: the last seven are held out whole."""


def validation_books(folder: Path) -> str:
    """The books that are held out whole. Raises ConfigError for a file of other books, of which training
    could have read one."""
    train, rest = corpus.books(folder)
    begin = rest.find("\n" + FIRST_BOOK) + 1
    if not begin or "\n" + FIRST_BOOK in train:
        raise ConfigError(
            f"{folder / corpus.BOOKS} holds other books than this split was made for: {FIRST_BOOK.strip()!r} "
            f"must begin in its last {corpus.HELD_OUT:.0%}, which training doesn't read"
        )
    return rest[begin:]


def write(data: Path, tasks: list[int], out: Path) -> dict[str, int]:
    """Write ``babi/qaN_validation.txt`` and ``books/validation.txt``; how many questions each task has."""
    books = validation_books(data)
    found = load_stories(data / "babi", tasks, "validation")
    for folder in ("babi", "books"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "books" / "validation.txt").write_text(books, encoding="utf-8")
    counts = {}
    for number, stories in zip(tasks, found, strict=True):
        (out / "babi" / f"qa{number}_validation.txt").write_text(written(stories), encoding="utf-8")
        counts[f"qa{number}"] = sum(len(story.questions) for story in stories)
    return counts | {"book_bytes": len(books.encode())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the validation split as files.")
    parser.add_argument("--data", help=f"folder with {corpus.BOOKS} and babi/")
    parser.add_argument("--tasks", default="1-10")
    parser.add_argument("--out", type=Path, default=Path("build/validation"))
    args = parser.parse_args()
    print(json.dumps(write(corpus.data_folder(args.data), parse_numbers(args.tasks), args.out)))


if __name__ == "__main__":
    main()
