from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer

from mnemosyne.training.corpus import Stream
from mnemosyne.training.facts import PROMPT, QUESTION, RELATIONS, Relation, split_of
from mnemosyne.training.rows import Batch
from mnemosyne.training.samples import Sampler

CASES = [(256, 0.0), (512, 20.0), (1024, 100.0), (2048, 600.0)]


def _patterns(templates: Callable[[Relation], tuple[str, ...]]) -> list[tuple[str, re.Pattern[str]]]:
    """(relation, pattern) of every template."""
    fields = {"entity": r"(?P<entity>\w+ \w+)", "value": r"(?P<value>\w+)"}
    found = []
    for relation in RELATIONS:
        for template in templates(relation):
            bare = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
            found.append((relation.name, re.compile(bare.format(name=re.escape(relation.name), **fields))))
    return found


def _match(patterns: list[tuple[str, re.Pattern[str]]], text: str) -> tuple[str, re.Match[str]]:
    found = [(name, m) for name, p in patterns if (m := p.fullmatch(text))]
    assert len(found) == 1, f"{text!r} fits {len(found)} templates"
    return found[0]


def _check_row(tokenizer: Tokenizer, batch: Batch, row: int) -> tuple[int, int, int]:
    """Every answer of the row is what was told last. (facts told, answers, different pairs)."""
    ids = batch.tokens[row].tolist()
    sentences = _patterns(lambda relation: relation.sentences)
    questions = _patterns(lambda relation: (str(PROMPT["user"]).format(content=QUESTION),))
    told: dict[tuple[str, str], tuple[str, int]] = {}
    facts = answers = 0
    begin = 0
    for t in range(len(ids)):
        if batch.fact[row, t]:
            assert not batch.text[row, t] and not batch.answer[row, t]
            if t + 1 == len(ids) or not batch.fact[row, t + 1] or tokenizer.decode([ids[t]]) == ".":
                text = tokenizer.decode(ids[begin : t + 1])
                name, match = _match(sentences, text.removeprefix(" "))
                assert batch.fact[row, begin : t + 1].tolist() == [1] * (t - begin - 1) + [2, 1]
                assert tokenizer.decode([ids[t - 1]]) == f" {match['value']}"
                told[match["entity"], name] = (match["value"], t + 1)
                assert split_of(match["entity"], name) == "train"
                begin = t + 1
                facts += 1
        else:
            begin = t + 1
        if batch.answer[row, t]:
            assert not batch.text[row, t]
            asked = tokenizer.decode(ids[max(0, t - 40) : t])
            name, match = _match(questions, asked[asked.rindex("\n") :])
            value, end = told[match["entity"], name]
            assert tokenizer.decode([ids[t]]) == f" {value}"
            assert tokenizer.decode(ids[t + 1 : t + 3]) == ".\n"
            assert batch.distance[row, t] == t - end
            answers += 1
    return facts, answers, len(told)


@pytest.mark.parametrize(("length", "noise"), CASES)
def test_every_answer_is_the_fact_told_last(
    tokenizer: Tokenizer, sampler: Sampler, length: int, noise: float
) -> None:
    batch = sampler.batch(8, length, noise)
    assert all(a.shape == (8, length) for a in vars(batch).values())
    counts = [_check_row(tokenizer, batch, row) for row in range(8)]
    assert min(facts for facts, _, _ in counts) >= 1
    assert np.mean([answers for _, answers, _ in counts]) >= 4
    assert (batch.distance[~batch.answer] == 0).all()
    assert batch.tokens.min() >= 0 and batch.tokens.max() < 6144


def test_most_answers_of_long_rows_are_out_of_attentions_reach(sampler: Sampler) -> None:
    batch = sampler.batch(32, 2048, 100)
    assert np.mean(batch.distance[batch.answer] > 384) > 0.6


def test_noise_thins_the_facts(sampler: Sampler) -> None:
    shares = [(sampler.batch(32, 1024, noise).fact > 0).mean() for noise in (0, 50, 400)]
    assert shares[0] > shares[1] > shares[2] > 0


def test_some_facts_are_told_anew(tokenizer: Tokenizer, sampler: Sampler) -> None:
    batch = sampler.batch(16, 1024, 0)
    rows = [_check_row(tokenizer, batch, row) for row in range(16)]
    again = sum(facts - pairs for facts, _, pairs in rows)
    assert 0 < again < 0.15 * sum(facts for facts, _, _ in rows)


def test_targets_point_before_what_they_predict(sampler: Sampler) -> None:
    batch = sampler.batch(8, 512, 10)
    chosen = sampler.targets(batch, answers=20, text=64)
    rows = np.arange(8)[:, None]
    assert (chosen.target == batch.tokens[rows, chosen.at + 1]).all()
    assert chosen.answer.sum() == np.minimum(batch.answer.sum(1), 20).sum()
    assert batch.answer[rows, chosen.at + 1][chosen.answer > 0].all()
    assert batch.text[rows, chosen.at + 1][chosen.text > 0].all()
    assert (chosen.distance[chosen.answer > 0] > 0).all()


def test_the_same_seed_makes_the_same_rows(tokenizer: Tokenizer, stream: Stream) -> None:
    first, second, other = (
        Sampler(tokenizer, [(stream, 1.0)], s).batch(4, 512, 20).tokens for s in (1, 1, 2)
    )
    assert (first == second).all() and (first != other).any()


def test_too_little_text_is_refused(tokenizer: Tokenizer, stream: Stream) -> None:
    short = Stream(stream.tokens[:100], stream.ends[stream.ends <= 100])
    with pytest.raises(ValueError, match="too few for rows of 512"):
        Sampler(tokenizer, [(short, 1.0)], 0).batch(1, 512, 10)
