"""Background text for training: books, and documentation as Python modules carry it. Owns where the text
comes from, what is held out, and the token files that the sample makers read; knows no fact and no model.

What the demo reads (``pydoc_data`` and ``facts.DEMO_MODULES``) is left out. Each source becomes
``NAME_tokens.npy`` (uint16) and ``NAME_ends.npy`` (int32: where each line or sentence ends, in tokens).

    python -m mnemosyne.training.corpus --data ../shared/data --out build/training-data
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import site
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mnemosyne.training.facts import DEMO_MODULES, docstrings

BOOKS = "books-train.txt.xz"
HELD_OUT = 0.19
"""The last part of the books: validation, never trained on; a million tokens of the shared ones."""
DOCS_BYTES = 11_000_000


def data_folder(given: str | None = None) -> Path:
    """The folder with the books. Raises FileNotFoundError that says what is missing."""
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / BOOKS).is_file():
        raise FileNotFoundError(
            f"{folder / BOOKS} isn't there. Training needs plain public-domain book text, one paragraph to a "
            f"line, as {BOOKS} in a folder that --data names; serving and the tests don't need it."
        )
    return folder


def books(folder: Path) -> tuple[str, str]:
    """(training text, held-out text)."""
    text = lzma.decompress((folder / BOOKS).read_bytes()).decode("utf-8")
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT))) + 1
    return text[:cut], text[cut:]


def _modules(root: Path) -> Iterator[Path]:
    skip = {"pydoc_data", "site-packages", "dist-packages", "test", "tests", "idlelib", "mnemosyne"}
    return (p for p in sorted(root.rglob("*.py")) if skip.isdisjoint(p.relative_to(root).parts))


def standard_sources() -> Iterator[Path]:
    """The standard library's modules, but for those that the demo reads."""
    root = Path(sysconfig.get_path("stdlib"))
    demo = {*DEMO_MODULES, *(f"{name}.py" for name in DEMO_MODULES)}
    return (path for path in _modules(root) if path.relative_to(root).parts[0] not in demo)


def _document(path: Path) -> str:
    """A module's docstrings, of a long one the first; empty where there is hardly any."""
    text = "\n\n".join(docstrings(path))
    return text[:60_000] if len(text) >= 500 else ""


def standard_docs(limit: int) -> str:
    """Documentation of the standard library without the demo's modules, whole modules until there are
    ``limit`` characters."""
    chosen: list[str] = []
    size = 0
    for text in filter(None, map(_document, standard_sources())):
        if size >= limit:
            break
        chosen.append(text)
        size += len(text)
    return "\n\n".join(chosen) + "\n"


def docs(limit: int = DOCS_BYTES) -> str:
    """Documentation of the standard library (without the demo's modules) and of the installed packages.

    A module's docstrings stay together; the modules are shuffled, so that ``limit`` characters sample all of
    them. The standard library comes whole.
    """
    chosen: list[str] = []
    for i, path in enumerate(standard_sources()):
        chosen.append(_document(path))
        if i % 8 == 0 and path.stat().st_size < 40_000:  # some source: the manuals quote code
            chosen.append(path.read_text(encoding="utf-8", errors="replace"))
    installed = [_document(path) for root in site.getsitepackages() for path in _modules(Path(root))]
    random.Random(0).shuffle(installed)
    size = sum(map(len, chosen))
    for text in installed:
        if size >= limit:
            break
        chosen.append(text)
        size += len(text)
    random.Random(1).shuffle(chosen)
    return "\n\n".join(filter(None, chosen)) + "\n"


BOOK_END = re.compile(r"[.!?][\"']?(?= )|(?<!\s)(?=\n)")
DOCS_END = re.compile(r"[.!?:)](?=\n)|(?<!\s)(?=\n\n)")


@dataclass(frozen=True)
class Stream:
    """One source as tokens, and where its sentences end (token offsets, rising)."""

    tokens: NDArray[np.uint16]
    ends: NDArray[np.int32]

    def ended(self, at: int) -> int:
        """How many sentences end at ``at`` tokens or before."""
        # A number of another type would have all ends copied to that type.
        return int(self.ends.searchsorted(np.int32(at), "right"))

    def having(self, chosen: Sequence[int]) -> Stream:
        """The sentences that have one of the ``chosen`` tokens."""
        starts = np.concatenate([[0], self.ends[:-1]])
        here = np.logical_or.reduceat(np.isin(self.tokens[: self.ends[-1]], chosen), starts)
        lengths = self.ends - starts
        kept = self.tokens[: self.ends[-1]][np.repeat(here, lengths)]
        return Stream(kept, np.cumsum(lengths[here]).astype(np.int32))


def encode(tokenizer: Tokenizer, text: str, ends: re.Pattern[str]) -> Stream:
    """The text's tokens and its sentence ends. Encoded piece by piece, for the tokenizer never joins over an
    end."""
    cuts = [0, *(match.end() for match in ends.finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if b > a]
    ids = [e.ids for e in tokenizer.encode_batch(pieces, add_special_tokens=False)]
    return Stream(
        np.fromiter((i for piece in ids for i in piece), np.uint16),
        np.cumsum([len(i) for i in ids]).astype(np.int32),
    )


def load(folder: Path, name: str) -> Stream:
    """A source that ``main`` prepared: ``books``, ``held_out`` or ``docs``."""
    try:
        return Stream(np.load(folder / f"{name}_tokens.npy"), np.load(folder / f"{name}_ends.npy"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} isn't there: run python -m mnemosyne.training.corpus"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the training text as token files.")
    parser.add_argument("--data", help=f"folder with {BOOKS}")
    parser.add_argument("--tokenizer", type=Path, default=Path("checkpoints/mnemosyne-1/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=Path("build/training-data"))
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    train, held_out = books(data_folder(args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text, ends in (
        ("books", train, BOOK_END),
        ("held_out", held_out, BOOK_END),
        ("docs", docs(), DOCS_END),
    ):
        stream = encode(tokenizer, text, ends)
        np.save(args.out / f"{name}_tokens.npy", stream.tokens)
        np.save(args.out / f"{name}_ends.npy", stream.ends)
        row = {
            "source": name,
            "bytes": len(text.encode()),
            "tokens": len(stream.tokens),
            "sentences": len(stream.ends),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
