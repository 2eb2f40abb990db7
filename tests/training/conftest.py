"""Shared pieces of the training tests: the shipped tokenizer, background text that every Python has, a tiny
run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mnemosyne.training import corpus
from mnemosyne.training.facts import demo_text
from mnemosyne.training.samples import Sampler
from mnemosyne.training.settings import Settings, parse

TOKENIZER = Path(__file__).resolve().parents[2] / "checkpoints" / "mnemosyne-1" / "tokenizer.json"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="session")
def stream(tokenizer: Tokenizer) -> corpus.Stream:
    return corpus.encode(tokenizer, demo_text(200_000), corpus.DOCS_END)


@pytest.fixture
def sampler(tokenizer: Tokenizer, stream: corpus.Stream) -> Sampler:
    return Sampler(tokenizer, [(stream, 1.0)], seed=3)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, stream: corpus.Stream) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("books", "docs"):
        np.save(folder / f"{name}_tokens.npy", stream.tokens)
        np.save(folder / f"{name}_ends.npy", stream.ends)
    return folder


@pytest.fixture
def settings(tmp_path: Path, data: Path) -> Settings:
    given = (
        "--layers 1 --dim 64 --chunk 16 --window 16 --expansion 1 --step-tokens 512 --workers 1 --warmup 5"
    )
    paths = ["--data", str(data), "--tokenizer", str(TOKENIZER), "--out", str(tmp_path / "run")]
    return parse([*given.split(), "--lengths", "128:1e9", *paths])
