"""Loss by position: what is measured, cut and counted, on models that are small and on numbers made up."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from mnemosyne.engine.advance import advance
from mnemosyne.engine.errors import ConfigError, NotFinite
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import SessionState
from mnemosyne.training import perplexity
from mnemosyne.training.books import Book
from mnemosyne.training.experiments import figures
from mnemosyne.training.perplexity import Subject
from tests.engine.models import VARIANTS, random_tokens, small_config, small_model

SEGMENT = 48


def tiny(variant: str = "mag") -> Titans:
    return small_model(small_config(variant, dim=16), torch.float64)  # type: ignore[arg-type]


def loss(model: Titans, state: SessionState, token: int) -> float:
    logits, _ = model.open_chunk([state])
    return float(F.cross_entropy(logits, torch.tensor([token])))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_two_arms_are_what_a_session_computes(variant: str) -> None:
    """Against sessions that read token by token, one of them with its memory put back at every segment."""
    model = tiny(variant)
    tokens = random_tokens(2 * SEGMENT + 1, seed=4)
    on, reset = perplexity.measure(model, np.array([tokens, tokens[::-1]]))
    assert on.shape == reset.shape == (2, 2)
    for arm, forgets in ((on[0], False), (reset[0], True)):
        state, blank = model.initial_state(), model.initial_state().tensors
        for i in range(2):
            here = tokens[i * SEGMENT : (i + 1) * SEGMENT]
            losses = []
            for n in range(1, SEGMENT + 1):
                now = advance(model, state, here[:n], chunk=model.config.chunk)
                losses.append(loss(model, now, tokens[i * SEGMENT + n]))
            assert arm[i] == pytest.approx(sum(losses) / SEGMENT, abs=1e-8)
            (committed,), _ = model.prefill([state], torch.tensor([here]))
            state = SessionState(committed.position, committed.tensors)
            if forgets:
                kinds = ("memory.", "momentum.", "segment_memory.")
                mixed = {n: blank[n] if n.startswith(kinds) else t for n, t in state.tensors.items()}
                state = SessionState(state.position, mixed)
    assert np.allclose(on[:, 0], reset[:, 0]) and not np.allclose(on[:, 1:], reset[:, 1:], atol=1e-3)


def test_a_loss_that_isnt_finite_is_an_error_with_its_place() -> None:
    model = tiny()
    model.norm.weight.data[0] = math.inf
    with pytest.raises(NotFinite, match="tokens 0 to 48"):
        perplexity.measure(model, np.zeros((1, 2 * SEGMENT + 1), np.int64))


def test_the_curve_counts_by_what_was_read_before() -> None:
    segment = 500
    on = np.arange(20, dtype=float).reshape(1, 20).repeat(2, 0)
    reset = on + np.array([[0.5], [1.5]])
    rows = perplexity.curve(on, reset, segment)
    assert [(r["from"], r["to"], r["tokens"]) for r in rows] == [
        (0, 2000, 4000),
        (2000, 4000, 4000),
        (4000, 8000, 8000),
        (8000, 10_000, 4000),
    ]
    assert [r["on"] for r in rows] == [1.5, 5.5, 11.5, 17.5]
    assert all(r["gain"] == 1.0 and r["reset"] == r["on"] + 1 for r in rows)
    sd = math.sqrt(8 * 0.25 / 7)
    assert rows[0]["half"] == pytest.approx(1.959964 * sd / math.sqrt(8))
    assert perplexity.curve(on[:1, :1], reset[:1, :1], segment)[0]["half"] is None


@pytest.fixture
def subject(tokenizer: Tokenizer) -> Subject:
    config = dataclasses.replace(small_config(dim=16), vocab_size=tokenizer.get_vocab_size())
    return Subject("tiny", small_model(config), tokenizer)


def test_streams_are_stretches_of_the_books_that_dont_overlap(subject: Subject) -> None:
    books = [
        Book("a", "It was a dark night.\n\nAnd cold.\n" * 40),
        Book("b", "Nobody came, said the fox. " * 90),
    ]
    text = "".join(f"{book.text.rstrip()}\n" for book in books)
    ids = subject.tokenizer.encode(text).ids
    read = perplexity.cut(books, subject, 200, 3)
    assert read.tokens.shape == (3, 4 * SEGMENT + 1)
    assert read.bytes_per_token == len(text) / len(ids)
    for i, row in enumerate(read.tokens):
        start = i * (len(ids) // 3)
        assert row.tolist() == ids[start : start + 4 * SEGMENT + 1]
    whole = perplexity.cut(books, subject, None, 8)
    assert whole.tokens.shape == (1, (len(ids) - 1) // SEGMENT * SEGMENT + 1)
    with pytest.raises(
        ConfigError, match=f"have {len(ids)} tokens of tiny's tokenizer, and 100000 are needed"
    ):
        perplexity.cut(books, subject, 100_000, 1)
    with pytest.raises(ConfigError, match="49 are needed"):
        perplexity.cut(books, subject, 48, 1)


def test_table_and_figure(subject: Subject, tmp_path: Path) -> None:
    read = perplexity.Streams(np.zeros((2, 97), np.int64), 3.5)
    rows = [
        {"from": 0, "to": 2000, "tokens": 4000, "on": 5.0, "reset": 5.0, "gain": 0.0, "half": 0.1},
        {"from": 2000, "to": 4000, "tokens": 4000, "on": 4.0, "reset": 4.5, "gain": 0.5, "half": 0.1},
        {"from": 4000, "to": 4500, "tokens": 500, "on": 4.5, "reset": 4.0, "gain": -0.5, "half": 0.1},
        {"from": 8000, "to": 8500, "tokens": 500, "on": 4.5, "reset": 4.0, "gain": -0.5, "half": None},
    ]
    found = perplexity.entry(subject, read, rows)
    assert (found["streams"], found["length"], found["variant"], found["depth"]) == (2, 96, "mag", 2)
    table = perplexity.table(found)
    assert [row[-1] for row in table.rows] == ["", "helps", "hurts", ""]
    bits = f"{4.0 / math.log(2) / 3.5:.3f}"
    assert table.rows[1][:6] == ["2k to 4k", "4,000", "4.000", "4.500", "+0.5000 ± 0.1000", bits]
    picture = figures.draw(perplexity.figure([found]), tmp_path).read_text(encoding="utf-8")
    assert "tiny, memory reset" in picture and "what the memory gains" in picture


def test_a_checkpoint_and_a_tokenizer_that_dont_belong_together_are_refused(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[2] / "checkpoints" / "mnemosyne-1"
    folder = tmp_path / "mixed"
    shutil.copytree(shipped, folder)
    smaller = Tokenizer.from_file(str(shipped / "tokenizer.json"))
    smaller.add_tokens(["<one more>"])
    smaller.save(str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match="has 6145 tokens and config.json says vocab_size 6144"):
        perplexity.load_subject(folder, "cpu")
