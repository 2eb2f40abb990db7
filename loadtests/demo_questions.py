"""The demo's text with its hidden facts, asking for them, and grading. Knows no process."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.progress import track
from rich.table import Table

from mnemosyne.server.cli.client import Answer, Client
from mnemosyne.training.facts import Fact, demo_text, hide, make_facts

LONGEST_ANSWER = 32
READERS = 8
LEAST_PROMISED = 24


@dataclass(frozen=True)
class HiddenFacts:
    """A text and the facts in it, in the order in which they stand."""

    text: str
    facts: list[Fact]
    tail: str
    """What stands after the last fact."""


@dataclass(frozen=True)
class Round:
    """One pass over all questions."""

    answers: list[Answer]
    right: int

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


def hidden_facts(seed: int, count: int, min_bytes: int) -> HiddenFacts:
    """The same for the same seed and Python version."""
    facts = make_facts(seed, count)
    text, positions = hide(demo_text(min_bytes), facts, seed)
    return HiddenFacts(text, facts, text[positions[-1] + len(facts[-1].sentence) :])


def is_right(fact: Fact, answer: str) -> bool:
    """The model answers in a sentence that ends with the value: its last word must be the fact's one word."""
    words = answer.strip().rstrip(".").split()
    return bool(words) and words[-1].casefold() == fact.answer.casefold()


def ask_all(client: Client, session_id: str, facts: list[Fact], title: str) -> Round:
    """Put every question to the same version of the session, several at once: none of them is learned."""
    model = client.models()[0]["id"]

    def ask(fact: Fact) -> Answer:
        return client.ask(
            fact.question, session_id, model, learn=False, temperature=0, max_tokens=LONGEST_ANSWER
        )

    with ThreadPoolExecutor(READERS) as pool:
        answers = list(track(pool.map(ask, facts), title, total=len(facts), transient=True))
    right = sum(is_right(fact, answer.text) for fact, answer in zip(facts, answers, strict=True))
    return Round(answers, right)


def answers_table(facts: list[Fact], asked: Round) -> Table:
    table = Table(title="Asked at the end, from memory", title_justify="left", expand=True)
    table.add_column("#", justify="right")
    table.add_column("question and answer", overflow="fold", ratio=1)
    table.add_column("truth")
    table.add_column("")
    for number, (fact, answer) in enumerate(zip(facts, asked.answers, strict=True), 1):
        mark = "[green]right[/green]" if is_right(fact, answer.text) else "[red]wrong[/red]"
        said = f"{fact.question} {' '.join(answer.text.split())}"
        table.add_row(str(number), escape(said), fact.answer, mark)
    return table


def promised(checkpoint: Path) -> int:
    """How many right answers the checkpoint's folder promises in this demo."""
    prompt = json.loads((checkpoint / "prompt.json").read_text(encoding="utf-8"))
    return max(LEAST_PROMISED, int(prompt.get("promise", {}).get("demo_right", 0)))


def attention_span(checkpoint: Path) -> int:
    """The most tokens that attention can see at once: what stands further back is memory's."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return int(max(config["segment"], config["window"]))
