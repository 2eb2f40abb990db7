"""The construction: counted by the tokenizer, facts in order, places spread evenly, the same for a seed."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mnemosyne.engine.errors import ConfigError
from mnemosyne.training.babilong.haystack import SHORTEST, Haystack, make_haystack
from mnemosyne.training.babilong.samples import Maker, Sample, plan, samples_at
from mnemosyne.training.babilong.tasks import Task, load_task
from mnemosyne.training.books import Book

from .conftest import book


@pytest.fixture
def task(babi: Path) -> Task:
    return load_task(babi, 1)


def text_of(sample: Sample) -> str:
    return sample.open().read().decode()


def count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_sentences_are_the_books_without_the_short_ones(haystack: Haystack, tokenizer: Tokenizer) -> None:
    whole = b"".join(haystack.views(0, haystack.sentences)).decode()
    assert haystack.sentences == 60 and "Yes" not in whole
    assert whole.replace("\n", " ") == "".join(
        f" The {i} travellers of the night came slowly down to the harbour at last." for i in range(60)
    )
    assert whole.count("\n") == 20  # lines begin where the book's do
    assert haystack.tokens == count(tokenizer, whole) and haystack.nbytes == len(whole)
    with pytest.raises(ConfigError, match=f"no sentence of {SHORTEST} tokens: a"):
        make_haystack([Book("a", "Yes. No.")], tokenizer)


def test_sentences_go_on_without_end(haystack: Haystack) -> None:
    n = haystack.sentences
    assert haystack.at(2 * n + 3) - haystack.at(n + 3) == haystack.tokens
    for first, tokens in ((0, 0), (0, 15), (55, 500), (3, 5000)):
        end = haystack.reach(first, tokens)
        assert haystack.at(end) - haystack.at(first) <= tokens < haystack.at(end + 1) - haystack.at(first)
    wrapped = b"".join(haystack.views(n - 1, n + 2))
    assert wrapped == b"".join(bytes(v) for i in (n - 1, 0, 1) for v in haystack.views(i, i + 1))


@pytest.mark.parametrize("length", [30, 64, 400, 1000, 5000])
def test_a_sample_has_the_tokens_and_facts_it_says(
    length: int, haystack: Haystack, tokenizer: Tokenizer, task: Task
) -> None:
    maker = Maker(haystack, tokenizer, seed=1)
    for index, question in enumerate(maker.chosen(task, length, 3)):
        sample = maker.make(task, length, index, question)
        text = text_of(sample)
        assert sample.tokens == count(tokenizer, text) and len(text.encode()) == sample.nbytes
        # Short of the length by less than a word.
        assert length - 5 < sample.tokens <= length
        places = [text.index(f" {fact}") for fact in question.facts]
        assert places == sorted(places)
        depths = tuple(count(tokenizer, text[: places[i]]) / sample.tokens for i in question.supporting)
        assert sample.depths == pytest.approx(depths)
        assert (sample.question, sample.answer) == (question.question, question.answer)
        background = text
        for fact in question.facts:
            background = background.replace(f" {fact}", "", 1)
        assert count(tokenizer, background) == pytest.approx(sample.repeats * haystack.tokens)
        # What is left is the books from one sentence on, in order, cut at the end alone.
        numbers = [int(n) for n in re.findall(r"The (\d+) travellers", background)]
        assert all((b - a) % 60 == 1 for a, b in zip(numbers, numbers[1:], strict=False))
        assert set(background.split()) <= set(book().split())


def test_a_fact_stands_anywhere_with_equal_chance(
    haystack: Haystack, tokenizer: Tokenizer, task: Task
) -> None:
    maker = Maker(haystack, tokenizer, seed=2)
    question = task.questions[0]
    made = [maker.make(task, 600, i, question) for i in range(400)]
    depths = np.array([sample.depths[0] for sample in made])  # the first of two facts: the lower of two draws
    assert 0.25 < depths.mean() < 0.42 and depths.min() < 0.05 and depths.max() > 0.85
    begins = {text_of(sample)[:12] for sample in made if sample.depths[0] > 0}
    assert len(begins) > 40  # the background begins anywhere too


def test_samples_are_a_function_of_the_seed(haystack: Haystack, tokenizer: Tokenizer, task: Task) -> None:
    def all_of(seed: int) -> list[tuple[str, str]]:
        maker = Maker(haystack, tokenizer, seed)
        asked = plan(maker, [task], [200, 100], {100: 4, 200: 3})
        assert [one.key for one in asked] == [
            *(("qa1", 100, i) for i in range(4)),
            *(("qa1", 200, i) for i in range(3)),
        ]
        made = [maker.make(one.task, one.length, one.index, one.question) for one in asked]
        return [(text_of(sample), sample.question) for sample in made]

    first = all_of(1)
    assert first == all_of(1) != all_of(2)
    assert len(set(first)) == len(first)
    assert [question for _, question in first[:3]] == [question for _, question in first[4:]]  # paired


def test_a_length_that_facts_dont_fit_is_refused(
    haystack: Haystack, tokenizer: Tokenizer, task: Task
) -> None:
    maker = Maker(haystack, tokenizer, seed=1)
    costs = sorted(maker.fact_tokens(question) for question in task.questions)
    with pytest.raises(ConfigError, match=f"qa1 can't be asked at {costs[0] - 1} tokens.*have {costs[0]}$"):
        plan(maker, [task], [costs[0] - 1], {costs[0] - 1: 1})
    fits = sum(cost <= costs[1] for cost in costs)
    assert fits < 4
    with pytest.raises(ConfigError, match=rf"has {fits} questions whose facts fit into.*--samples {fits}$"):
        plan(maker, [task], [costs[1]], {costs[1]: 4})
    assert len(plan(maker, [task], [costs[1]], {costs[1]: fits})) == fits


def test_the_text_is_a_file_that_can_be_gone_back_in(
    haystack: Haystack, tokenizer: Tokenizer, task: Task
) -> None:
    sample = Maker(haystack, tokenizer, 1).make(task, 3000, 0, task.questions[1])
    whole, file = sample.open().read(), sample.open()
    assert len(sample.pieces) > 6
    for offset, size in ((0, 10), (500, 3000), (7, 1), (len(whole) - 5, 100), (len(whole), 10), (123, 5000)):
        file.seek(offset)
        assert file.read(size) == whole[offset : offset + size]
    assert file.seek(0, io.SEEK_END) == len(whole)


def test_how_many_samples_a_length_gets() -> None:
    assert [samples_at(n) for n in (1000, 128_000, 256_000, 1_000_000, 10_000_000)] == [100, 100, 50, 50, 20]
