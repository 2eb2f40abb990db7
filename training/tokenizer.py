"""The tokenizer's training. Owns its shape (byte-level BPE, how text is cut before it) and what it is trained
on; serving only reads the ``tokenizer.json`` that comes out.

Every byte sequence that is UTF-8 comes back as it was: there is no normalizer, no unknown token and no
special token. No piece that BPE sees is longer than 32 characters, so any text can be tokenized as it
arrives.

    python -m mnemosyne.training.tokenizer --out build/tokenizer.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mnemosyne.training import corpus, facts
from mnemosyne.training.babilong.stories import OBJECTS, PERSONS, PLACES, Names, Story, load_stories
from mnemosyne.training.babilong.tasks import TASKS

VOCABULARY = 6144
PIECES = r" ?\p{L}{1,31}| ?\p{N}| ?[^\s\p{L}\p{N}]{1,31}|\s{1,32}(?!\S)|\s"
"""Words and runs of marks with their leading space, digits singly, whitespace up to the space that a word
takes."""
_FACT_SENTENCES = 60_000
_STORIES = 6000


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fact_text(seed: int, count: int) -> Iterator[str]:
    """Sentences and questions of the training split, in batches of as many entities as are easily drawn."""
    rng = random.Random(seed)
    for _ in range(count // 500):
        for fact in facts.make_facts(rng.getrandbits(32), 500, split="train"):
            yield f" {fact.sentence}{fact.prompt} {fact.answer}\n"


def story_text(stories: Sequence[Story], seed: int, count: int) -> Iterator[str]:
    """``count`` of bAbI's stories with their questions, told of everyone and everything that rows tell of."""
    rng = random.Random(seed)
    for _ in range(count):
        story = Names(rng).told_of_others(rng.choice(stories), keep=False)
        if story is not None:
            yield "".join(f" {fact}" for fact in story.facts)
            for question in story.questions:
                yield str(facts.PROMPT["user"]).format(content=question.question) + f" {question.answer}.\n"


def train(
    background: list[str],
    stories: Sequence[Story] = (),
    vocabulary: int = VOCABULARY,
    sentences: int = _FACT_SENTENCES,
) -> Tokenizer:
    """A tokenizer for these texts, for ``sentences`` facts and for ``stories``, whose words are then single
    tokens."""
    tokenizer = build()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    lines = [line for text in background for line in text.splitlines(keepends=True)]
    blocks = ["".join(lines[i : i + 50]) for i in range(0, len(lines), 50)]  # newlines meet what follows them
    told = story_text(stories, 0, _STORIES if stories else 0)
    tokenizer.train_from_iterator([*blocks, *fact_text(0, sentences), *told], trainer)
    return tokenizer


def single_tokens(tokenizer: Tokenizer, words: Iterator[str]) -> list[str]:
    """The words that, after a space, take more than one token."""
    return [word for word in words if len(tokenizer.encode(" " + word).ids) > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tokenizer.")
    parser.add_argument("--data", help=f"folder with {corpus.BOOKS}")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--out", type=Path, default=Path("build/tokenizer.json"))
    args = parser.parse_args()
    data = corpus.data_folder(args.data)
    book_text, held_out = corpus.books(data)
    tasks = load_stories(data / "babi", range(1, TASKS + 1), "train")
    stories = [story for task in tasks for story in task]
    tokenizer = train([book_text[:6_000_000], corpus.docs(6_000_000)], stories, args.vocabulary)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out), pretty=False)
    demo = facts.demo_text(600_000)
    values = (value for relation in facts.RELATIONS for value in relation.values)
    print(
        json.dumps(
            {
                "vocabulary": tokenizer.get_vocab_size(),
                "books_bytes_per_token": len(held_out.encode()) / len(tokenizer.encode(held_out).ids),
                "demo_bytes_per_token": len(demo.encode()) / len(tokenizer.encode(demo).ids),
                "values_split": single_tokens(tokenizer, values),
                "entities_split": single_tokens(tokenizer, iter(facts.ADJECTIVES + facts.NOUNS)),
                "story_words_split": single_tokens(tokenizer, iter(PERSONS + OBJECTS + PLACES)),
            }
        )
    )


if __name__ == "__main__":
    main()
