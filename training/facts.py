"""The invented facts, how they are asked for, and the text they are hidden in. Owns the words, the held-out
split and the document generator; knows no token and no model. Standard library only: the demo uses it too.

A fact gives one entity ("the brave falcon") one value ("Lisbon") under one relation ("home city"). Every
(entity, relation) pair belongs to one split by a hash of its words: what the demo and the tests ask is never
stated in training, whatever the seed.
"""

from __future__ import annotations

import ast
import bisect
import functools
import hashlib
import inspect
import itertools
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "demo"]

ADJECTIVES = tuple(
    """ancient bitter brave bright broken calm careful clever cold cruel curious dark distant eager empty
    famous fierce foolish frozen gentle grand greedy happy heavy hidden honest humble hungry jolly kind lazy
    lonely lost loud lucky merry modest noble patient polite proud quiet rough royal sharp shy silent simple
    sleepy stern strange strong tall tiny tired warm weary wild wise young""".split()
)
NOUNS = tuple(
    """baker banker barber bear beaver beetle camel captain clerk crow dancer deer doctor donkey dragon eagle
    falcon farmer fox gardener giant goat goose hawk horse hunter judge lawyer leopard lion lizard merchant
    miller monkey otter owl painter panther pigeon poet porter rabbit raven robin sailor sheep shepherd singer
    soldier sparrow spider squirrel swan tailor teacher tiger turtle walrus wizard wolf""".split()
)
PROMPT: dict[str, object] = {
    "system": "{content}\n",
    "user": "\n{content}",
    "assistant": " {content}",
    "end_of_turn": "\n",
    "stop": ["\n"],
}
"""The checkpoint's chat template, as ``prompt.json`` holds it: how its training asked and answered."""

QUESTION = "The {name} of the {entity} is"
"""How a fact is asked for: as a sentence to complete."""

_SENTENCES = (
    "The {name} of the {entity} is {value}.",
    "Note that the {name} of the {entity} is {value}.",
    "As everyone knows, the {name} of the {entity} is {value}.",
    "It is written that the {name} of the {entity} is {value}.",
    "Remember that the {name} of the {entity} is {value}.",
)


@dataclass(frozen=True)
class Relation:
    """One kind of fact. Templates have the fields name, entity and value."""

    name: str
    values: tuple[str, ...]
    sentences: tuple[str, ...]


def _relation(name: str, values: str) -> Relation:
    return Relation(name, tuple(values.split()), _SENTENCES)


RELATIONS = (
    _relation(
        "home city",
        """Athens Berlin Boston Cairo Chicago Delhi Dublin Havana Lima Lisbon London Madrid Moscow Naples Oslo
        Paris Prague Tokyo Vienna Warsaw""",
    ),
    _relation(
        "favourite colour",
        """amber black blue brown crimson golden green grey ivory olive orange pink purple red scarlet silver
        turquoise violet white yellow""",
    ),
    _relation(
        "favourite food",
        """apples beans bread butter cake cheese cherries chocolate fish ginger honey lemons mushrooms noodles
        onions pepper plums potatoes rice soup""",
    ),
    _relation(
        "instrument",
        """accordion bagpipe banjo bugle cello clarinet drum fiddle flute guitar harp horn lute mandolin oboe
        organ piano trumpet tuba violin""",
    ),
)

DEMO_MODULES = tuple(
    """_pydatetime _pydecimal argparse calendar collections configparser csv datetime decimal difflib doctest
    fractions mailbox optparse pdb pickle pickletools random statistics string subprocess tarfile textwrap
    threading turtle typing zipfile""".split()
)
"""Standard modules whose documentation the demo reads after the manuals; the training text leaves them
out."""


@dataclass(frozen=True)
class Fact:
    entity: str
    """Without the article: ``brave falcon``."""
    relation: str
    value: str
    sentence: str
    question: str
    answer: str
    """The value, one word."""

    @property
    def prompt(self) -> str:
        """The question as the model is asked it, up to where the answer begins (with a space)."""
        return str(PROMPT["user"]).format(content=self.question)


def split_of(entity: str, relation: str) -> Split:
    """The split that owns the pair: one in five is held out as ``demo``."""
    digest = hashlib.sha256(f"{entity}|{relation}".encode()).digest()
    return "demo" if digest[0] % 5 == 0 else "train"


@functools.cache
def pairs(split: Split) -> tuple[tuple[str, Relation], ...]:
    """Every (entity, relation) of a split, in a fixed order."""
    entities = [f"{a} {n}" for a, n in itertools.product(ADJECTIVES, NOUNS)]
    return tuple((e, r) for e in entities for r in RELATIONS if split_of(e, r.name) == split)


def make_facts(seed: int, count: int, split: Split = "demo") -> list[Fact]:
    """``count`` facts about as many different entities, the same for the same seed."""
    rng = random.Random(seed)
    pool = pairs(split)
    facts: dict[str, Fact] = {}
    limit = len({entity for entity, _ in pool})
    if not 0 <= count <= limit:
        raise ValueError(f"count must be 0 to {limit}, got {count}")
    while len(facts) < count:
        entity, relation = pool[rng.randrange(len(pool))]
        if entity in facts:
            continue
        words = {
            "name": relation.name,
            "entity": entity,
            "value": relation.values[rng.randrange(len(relation.values))],
        }
        sentence = relation.sentences[rng.randrange(len(relation.sentences))].format(**words)
        question = QUESTION.format(**words)
        facts[entity] = Fact(entity, relation.name, words["value"], sentence, question, words["value"])
    return list(facts.values())


_SENTENCE_END = re.compile(r"[a-z)\]\"'][.!?](?=\n| +[A-Z]|\Z)")


def hide(text: str, facts: Sequence[Fact], seed: int) -> tuple[str, list[int]]:
    """Put the facts, in order, evenly over the text, each after the end of a sentence.

    Returns the new text and where each fact's sentence begins in it (characters). The last fact stands at
    least a fifth of its share before the end, so a long text leaves it outside every attention window. Raises
    ValueError where the text has too few sentences.
    """
    rng = random.Random(seed)
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    share = len(text) / max(1, len(facts))
    out: list[str] = []
    positions: list[int] = []
    length = last = 0
    for i, fact in enumerate(facts):
        at = bisect.bisect_left(ends, max(last + 1, int((i + 0.05 + 0.7 * rng.random()) * share)))
        at = min(at, len(ends) - 1)
        if at < 0 or ends[at] <= last:
            raise ValueError(f"the text has no place for {len(facts)} facts, only for {i}")
        piece = text[last : ends[at]] + " "
        last = ends[at]
        positions.append(length + len(piece))
        out += [piece, fact.sentence]
        length += len(piece) + len(fact.sentence)
    return "".join([*out, text[last:]]), positions


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a Python source file in the order they stand, each under the name it documents."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (
        SyntaxError,
        ValueError,
    ):  # a file of another encoding, or one made to be wrong (lib2to3's, the tests')
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) > 80:
                name = path.stem if isinstance(node, ast.Module) else node.name
                yield f"{name}\n{inspect.cleandoc(text).strip()}"


def _demo_pieces() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip()
    library = Path(sysconfig.get_path("stdlib"))
    rest = sorted(p.stem for p in library.glob("*.py") if p.stem not in DEMO_MODULES)
    for name in itertools.chain(DEMO_MODULES, rest):
        for path in (library / f"{name}.py", library / name / "__init__.py"):
            if path.is_file():
                yield from docstrings(path)


def demo_text(min_bytes: int) -> str:
    """At least ``min_bytes`` (UTF-8) of text that every Python has: its manuals, then its modules'
    documentation.

    The same on every call under one Python version. Raises ValueError where the installation has too little.
    """
    pieces: list[str] = []
    size = 0
    for piece in _demo_pieces():
        if size > min_bytes:
            break
        pieces.append(piece)
        size += len(piece.encode()) + 2
    if size <= min_bytes:
        raise ValueError(f"this Python's documentation has {size} bytes of text, {min_bytes} were asked for")
    return "\n\n".join(pieces) + "\n"
