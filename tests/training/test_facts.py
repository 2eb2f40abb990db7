from __future__ import annotations

import hashlib

import pytest

from mnemosyne.training import facts


def test_a_seed_always_gives_the_same_facts() -> None:
    made = facts.make_facts(7, 40)
    assert made == facts.make_facts(7, 40)
    assert made != facts.make_facts(8, 40)
    digest = hashlib.sha256("|".join(f.sentence for f in made).encode()).hexdigest()
    assert digest.startswith("43a3d496"), (
        "the facts of a seed changed: results of earlier runs can't be compared"
    )


def test_facts_are_about_different_entities_and_say_their_answer() -> None:
    made = facts.make_facts(1, 400)
    assert len({f.entity for f in made}) == 400
    for fact in made:
        assert fact.entity in fact.sentence and fact.value in fact.sentence
        assert fact.entity in fact.question and fact.value not in fact.question
        assert fact.answer == fact.value and " " not in fact.answer
        assert fact.relation in fact.question and fact.prompt == f"\n{fact.question}"
        relation = next(r for r in facts.RELATIONS if r.name == fact.relation)
        fields = {"name": fact.relation, "entity": fact.entity, "value": fact.value}
        assert f"{fact.question} {fact.answer}." == relation.sentences[0].format(**fields)


def test_the_splits_share_no_pair_and_hold_out_a_fifth() -> None:
    demo = {(e, r.name) for e, r in facts.pairs("demo")}
    train = {(e, r.name) for e, r in facts.pairs("train")}
    assert not demo & train
    assert len(demo) + len(train) == len(facts.ADJECTIVES) * len(facts.NOUNS) * len(facts.RELATIONS)
    assert 0.18 < len(demo) / (len(demo) + len(train)) < 0.22
    assert all((f.entity, f.relation) in demo for f in facts.make_facts(3, 200))
    assert all((f.entity, f.relation) in train for f in facts.make_facts(3, 200, split="train"))


def test_words_and_values_are_unambiguous() -> None:
    values = [v for r in facts.RELATIONS for v in r.values]
    assert len(values) == len(set(values)) == 80
    assert len(set(facts.ADJECTIVES)) == len(set(facts.NOUNS)) == 60
    assert not set(values) & {*facts.ADJECTIVES, *facts.NOUNS}


def test_hidden_facts_stand_whole_in_order_and_spread_over_the_text() -> None:
    text = facts.demo_text(120_000)
    made = facts.make_facts(5, 40)
    full, positions = facts.hide(text, made, seed=5)
    assert positions == sorted(positions)
    for fact, at in zip(made, positions, strict=True):
        assert full[at : at + len(fact.sentence)] == fact.sentence
        assert full[at - 1] == " " and full[at - 2] in ".!?"
    for i, at in enumerate(positions):
        assert abs(at / len(full) - (i + 0.4) / 40) < 0.03
    bare = full
    for fact in made:
        bare = bare.replace(f" {fact.sentence}", "", 1)
    assert bare == text
    assert facts.hide(text, made, seed=5) == (full, positions)


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for 5 facts"):
        facts.hide("One sentence. ", facts.make_facts(1, 5), seed=1)


def test_the_background_is_long_enough_and_always_the_same() -> None:
    text = facts.demo_text(600_000)
    assert 600_000 <= len(text.encode()) < 700_000
    assert text == facts.demo_text(600_000)
    assert facts.demo_text(1000)[:900] == text[:900]
    with pytest.raises(ValueError, match="bytes of text"):
        facts.demo_text(10**9)


def test_the_background_states_no_fact() -> None:
    text = facts.demo_text(600_000)
    assert not [fact.entity for fact in facts.make_facts(11, 1000) if f"the {fact.entity}" in text]
