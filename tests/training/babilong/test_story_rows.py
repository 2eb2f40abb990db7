"""Rows that tell stories: read back from their tokens, every answer holds when it is asked."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mnemosyne.training.babilong.stories import OBJECTS, PERSONS, PLACES, Story
from mnemosyne.training.babilong.story_rows import StoryRows
from mnemosyne.training.babilong.strays import lookalikes
from mnemosyne.training.corpus import BOOK_END, Stream, encode
from mnemosyne.training.feed import draw, read_past, sampler, tokenizer_of
from mnemosyne.training.rows import Batch
from mnemosyne.training.settings import Settings
from mnemosyne.training.step import Step
from mnemosyne.training.train import build

from .test_stories import moves, told

FACT = re.compile(r" (\w+) went to the (\w+)\.")
WORDS = ("went", "to", "the")
CASES = [(128, 0.0), (256, 3.0), (1024, 30.0), (2048, 500.0)]


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return told(moves(60))


def made(tokenizer: Tokenizer, stream: Stream, stories: list[Story], seed: int = 1) -> StoryRows:
    return StoryRows(tokenizer, [(stream, 1.0)], seed, [stories, []])


def read_back(tokenizer: Tokenizer, batch: Batch, row: int) -> tuple[int, int, set[str]]:
    """Checks one row against where its persons are; (facts, answers, persons)."""
    ids = batch.tokens[row].tolist()
    where: dict[str, str] = {}
    facts = answers = t = 0
    while t < len(ids):
        if batch.fact[row, t]:
            end = t + ids[t:].index(tokenizer.token_to_id("."), 0) + 1
            text = tokenizer.decode(ids[t:end])
            match = FACT.fullmatch(text)
            assert match, text
            assert batch.fact[row, t:end].tolist() == [1] * (end - t - 2) + [2, 1]
            assert not batch.text[row, t:end].any() and not batch.answer[row, t:end].any()
            where[match[1]] = match[2]
            facts, t = facts + 1, end
        elif batch.answer[row, t]:
            end = t + int(np.argmin(np.append(batch.answer[row, t:], False)))
            asked = tokenizer.decode(ids[max(0, t - 40) : t])
            question = re.search(r"\nWhere is (\w+)\?$", asked)
            assert question, asked
            assert tokenizer.decode(ids[t:end]) == f" {where[question[1]]}"
            assert tokenizer.decode(ids[end : end + 2]) == ".\n"
            assert not batch.text[row, t:end].any()
            before = np.flatnonzero(batch.fact[row, :t])
            assert batch.distance[row, t] > 0 and batch.distance[row, t] >= t - before[-1] - 1
            assert (
                batch.fact[row, t - batch.distance[row, t] - 1] == 1
            )  # the full stop of a fact stands there
            answers, t = answers + 1, end
        else:
            t += 1
    return facts, answers, set(where)


@pytest.mark.parametrize(("length", "noise"), CASES)
def test_every_answer_holds_when_it_is_asked(
    length: int, noise: float, tokenizer: Tokenizer, stream: Stream, stories: list[Story]
) -> None:
    batch = made(tokenizer, stream, stories).batch(24, length, noise)
    counts = [read_back(tokenizer, batch, row) for row in range(24)]
    assert min(facts for facts, _, _ in counts) >= 2 and min(answers for _, answers, _ in counts) >= 1
    assert (batch.distance[~batch.answer] == 0).all()
    strays = ~batch.text & ~batch.answer & (batch.fact == 0)
    assert 0 < strays.mean() < 0.06
    words = {*WORDS, *PERSONS, *OBJECTS, *PLACES}
    assert set(batch.tokens[strays].tolist()) <= {
        i for word in words for i in tokenizer.encode(f" {word}").ids
    }


def test_background_is_text_with_strays(tokenizer: Tokenizer, stream: Stream, stories: list[Story]) -> None:
    rows = made(tokenizer, stream, stories)
    text = np.stack([rows.background(512) for _ in range(16)])
    told = tokenizer.decode_batch(text.tolist())
    whole = tokenizer.decode(stream.tokens.tolist())
    assert sum(part[:40] in whole for part in told) > 4  # a third has no strays, and few come early
    assert sum(name in "".join(told) for name in PERSONS) > sum(name in whole for name in PERSONS)


def test_dense_rows_tell_several_stories_of_different_people(
    tokenizer: Tokenizer, stream: Stream, stories: list[Story]
) -> None:
    batch = made(tokenizer, stream, stories).batch(16, 1024, 0.0)
    counts = [read_back(tokenizer, batch, row) for row in range(16)]
    assert np.mean([facts for facts, _, _ in counts]) > 20  # a story has six
    assert np.mean([len(persons) for _, _, persons in counts]) > 8  # and four persons


def test_noise_thins_and_questions_come_late(
    tokenizer: Tokenizer, stream: Stream, stories: list[Story]
) -> None:
    rows = made(tokenizer, stream, stories)
    dense, thin = rows.batch(32, 2048, 0.0), rows.batch(32, 2048, 400.0)
    assert (dense.fact > 0).sum() > 1.5 * (thin.fact > 0).sum()  # half of the rows stay dense
    shares = [np.quantile((batch.fact > 0).mean(1), 0.25) for batch in (thin, dense)]
    assert shares[0] < 0.05 < 0.15 < shares[1]
    assert (thin.distance > 256).any(1).mean() > 0.5
    asked = np.flatnonzero(thin.answer) % 2048 / 2048
    assert np.quantile(asked, 0.2) < 0.5 and np.quantile(asked, 0.8) > 0.9


def test_long_stories_are_told_as_far_as_a_row_holds(tokenizer: Tokenizer, stream: Stream) -> None:
    text = "".join(f"{n} Mary went to the {('office', 'garden')[n % 2]}.\n" for n in range(1, 11))
    text += "11 Where is Mary?\toffice\t10\n"
    text += "".join(f"{n} Mary went to the {('office', 'garden')[n % 2]}.\n" for n in range(12, 300))
    text += "300 Where is Mary?\tgarden\t299\n"
    batch = made(tokenizer, stream, told(text)).batch(8, 256, 5.0)
    for row in range(8):
        facts, answers, _ = read_back(tokenizer, batch, row)
        assert facts % 10 == 0 and answers == facts / 10 > 0


def test_the_same_seed_makes_the_same_rows(
    tokenizer: Tokenizer, stream: Stream, stories: list[Story]
) -> None:
    first, second, other = (made(tokenizer, stream, stories, s).batch(4, 512, 20).tokens for s in (1, 1, 2))
    assert (first == second).all() and (first != other).any()


def test_tasks_are_asked_equally_often(tokenizer: Tokenizer, stream: Stream, stories: list[Story]) -> None:
    """One whose stories ask once, one whose stories ask five times."""
    once = [Story(4, s.facts[:2], tuple(q for q in s.questions if len(q.facts) == 2)[:1]) for s in stories]
    once = [story for story in once if story.questions]
    rows = StoryRows(tokenizer, [(stream, 1.0)], 1, [stories, once])
    asked = rows.batch(64, 1024, 0.0).task
    begun = (asked[:, 1:] != asked[:, :-1]) & (asked[:, 1:] > 0)
    counts = [int((begun & (asked[:, 1:] == task)).sum()) for task in (stories[0].task, 4)]
    assert 0.4 < counts[0] / counts[1] < 2.5


def test_no_story_is_an_error(tokenizer: Tokenizer, stream: Stream) -> None:
    with pytest.raises(ValueError, match="no stories"):
        made(tokenizer, stream, [])


def test_a_run_is_fed_with_stories_by_its_settings_alone(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "qa1_moves_train.txt").write_text(moves(60), encoding="utf-8")
    chosen = dataclasses.replace(settings, babi=tmp_path, tasks="1")
    rows = sampler(chosen, 1)
    step = Step(build(chosen), chosen)
    losses = []
    for _ in range(2):
        for _ in range(6):
            step(draw(rows, 512, 128, 0.0), 3e-3)
        losses.append(step.read()["answer"])
    assert losses[1] < losses[0]


def test_lookalikes_are_the_sentences_with_words_of_the_stories(tokenizer: Tokenizer) -> None:
    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    text = "He took the letter.\nIt rained all day.\nSo she went up to the kitchen.\nNobody came"
    alike = lookalikes(encode(tokenizer, text, BOOK_END), ids)
    assert tokenizer.decode(alike.tokens.tolist()) == "He took the letter.\nSo she went up to the kitchen."
    assert alike.ended(len(alike.tokens) - 1) == 1 and alike.ended(len(alike.tokens)) == 2


def test_stories_are_hidden_among_lookalikes_where_they_fill_rows(settings: Settings) -> None:
    tokenizer = tokenizer_of(settings)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    few = encode(tokenizer, "It rained. " * 900 + "He took the letter. ", BOOK_END)
    assert [share for _, share in read_past(few, ids, settings)] == [1.0]
    many = encode(tokenizer, "It rained. He took the letter. " * 900, BOOK_END)
    (books, plain), (alike, share) = read_past(many, ids, settings)
    assert books is many and plain + share == 1 and len(alike.tokens) < len(many.tokens)
