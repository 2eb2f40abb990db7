from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from mnemosyne.training import facts
from mnemosyne.training.babilong.stories import PERSONS
from mnemosyne.training.tokenizer import fact_text, single_tokens, train

from .babilong.test_stories import moves, told

HARD = [
    "",
    " ",
    "\n\n\n",
    "\ufeffwith a byte order mark",
    "line\r\nline\r\n\r\n",
    "a\x00b\x00",
    "  \t  mixed \u00a0\u2003 spaces \n ",
    "naïve café — “quotes” … ½ ① Ⅷ",
    "日本語のテキスト、한국어, עברית, हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u202e",
    "x" * 1000 + " " * 1000 + "-" * 1000,
    "<|end|><s>[UNK]",
    "def f(x):\n    return {'a': [1, 20, 300]}\n",
]


@pytest.mark.parametrize("text", HARD, ids=lambda text: repr(text[:12]))
def test_every_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_random_characters_come_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    codes = [c for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    for _ in range(50):
        text = "".join(
            chr(rng.choice(codes)) if rng.random() < 0.5 else rng.choice(" \n.a") for _ in range(200)
        )
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_words_of_facts_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 6144
    words = [*facts.ADJECTIVES, *facts.NOUNS, *(v for r in facts.RELATIONS for v in r.values)]
    assert single_tokens(tokenizer, iter(words)) == []


def test_text_before_a_question_changes_none_of_its_tokens(tokenizer: Tokenizer) -> None:
    fact = facts.make_facts(1, 1)[0]
    before, asked = tokenizer.encode("Some text.").ids, tokenizer.encode(fact.prompt).ids
    assert tokenizer.encode(f"Some text.{fact.prompt}").ids == before + asked
    answered = tokenizer.encode(f"{fact.prompt} {fact.answer}.\n").ids
    assert answered[:-3] == asked
    assert [tokenizer.decode([i]) for i in answered[-3:]] == [f" {fact.answer}", ".", "\n"]


def test_documentation_is_compact(tokenizer: Tokenizer) -> None:
    text = facts.demo_text(600_000)
    assert len(text.encode()) / len(tokenizer.encode(text).ids) > 3


def test_training_one_gives_a_tokenizer_that_round_trips() -> None:
    made = train([facts.demo_text(20_000)], sentences=500)
    for text in HARD:
        assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text


def test_the_words_of_stories_are_single_tokens() -> None:
    """Of whomever rows tell them, not of bAbI's own people alone."""
    text, stories = [facts.demo_text(200_000)], told(moves(100))
    words = [*PERSONS, "went"]
    assert len(single_tokens(train(text, vocabulary=1000, sentences=0), iter(words))) > len(words) // 2
    made = train(text, stories, vocabulary=1000, sentences=0)
    assert made.get_vocab_size() == 1000 and single_tokens(made, iter(words)) == []


def test_its_training_text_has_no_held_out_fact() -> None:
    text = "".join(fact_text(0, 2000))
    for fact in facts.make_facts(2, 200):
        assert fact.question not in text
