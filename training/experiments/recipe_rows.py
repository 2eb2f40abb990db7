"""The rows of the recipe's runs: all runs of one seed learn from the same rows in the same order, and all
runs are judged by the same ones, which tell facts that no training tells among text that no training reads.
The text is documentation that every Python has. Knows no model and no change.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from mnemosyne.training import corpus
from mnemosyne.training.facts import demo_text
from mnemosyne.training.feed import Arrays, draw
from mnemosyne.training.samples import Sampler
from mnemosyne.training.settings import Settings

JUDGED_TOGETHER = 16_384
"""Tokens in a batch that is judged."""
UNSEEN = 1_000_003
"""Seed of the rows that runs are judged by."""


@dataclass(frozen=True)
class Maker:
    tokenizer: Tokenizer
    learned: corpus.Stream
    held_out: corpus.Stream

    def trained(self, seed: int, steps: int, tokens: int, length: int, noise: float) -> list[Arrays]:
        """A batch of ``tokens`` for every step of a run."""
        made = Sampler(self.tokenizer, [(self.learned, 1.0)], seed)
        return [draw(made, tokens, length, noise) for _ in range(steps)]

    def judged(self, rows: int, length: int, noise: float) -> list[Arrays]:
        made = Sampler(self.tokenizer, [(self.held_out, 1.0)], UNSEEN, "demo")
        together = max(1, min(rows, JUDGED_TOGETHER // length))
        return [draw(made, together * length, length, noise) for _ in range(-(-rows // together))]


def prepare(text: int) -> Maker:
    """``text``: bytes of documentation to learn from, and of other documentation to be judged by."""
    tokenizer = Tokenizer.from_file(str(Settings.tokenizer))
    texts = corpus.standard_docs(text), demo_text(text)
    return Maker(tokenizer, *(corpus.encode(tokenizer, one, corpus.DOCS_END) for one in texts))
