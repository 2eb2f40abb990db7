"""An unfinished chunk of one session with everything computed from its tokens. Provisional: never persisted.

Sessions that decode together share one group of stacked caches, each session a row of it, so that a step
copies nothing while they stay together. Knows no module; what the names mean is the mixers' matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mnemosyne.engine.memory import State
from mnemosyne.engine.state import SessionState


class OpenChunk:
    def __init__(
        self, committed: SessionState, tokens: tuple[int, ...], kinds: bytes, group: list[State], row: int
    ) -> None:
        self.committed = committed
        self.tokens = tokens
        self.kinds = kinds
        self.group = group
        """Per layer, name -> tensor with sessions first."""
        self.row = row

    @property
    def length(self) -> int:
        """Tokens in the chunk so far."""
        return len(self.tokens)

    @property
    def state(self) -> SessionState:
        """The session's state: the committed tensors with this chunk's tokens pending."""
        return dataclasses.replace(self.committed, pending=self.tokens, kinds=self.kinds)

    def append(self, token: int, kind: int) -> None:
        self.tokens = (*self.tokens, token)
        self.kinds += bytes([kind])


def group_of(chunks: Sequence[OpenChunk]) -> list[State]:
    """The caches of exactly these chunks in this order, stacked; to change them is to change the chunks'."""
    group = chunks[0].group
    rows = next(iter(group[0].values())).shape[0]
    if rows == len(chunks) and all(c.group is group and c.row == b for b, c in enumerate(chunks)):
        return group
    gathered: list[State] = []
    for layer in range(len(group)):
        names = group[layer]
        gathered.append({name: torch.stack([c.group[layer][name][c.row] for c in chunks]) for name in names})
    for row, chunk in enumerate(chunks):
        chunk.group, chunk.row = gathered, row
    return gathered
