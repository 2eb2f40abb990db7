"""An unfinished chunk of one session with everything computed from its tokens. Provisional: never persisted.

Knows no module; what a cache's names mean is the mixers' matter. Where the caches live is a model's own
choice: ``GroupedChunk`` is the reference's, ``engine.gpu.open_cache`` the kernels'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mnemosyne.engine.memory import State
from mnemosyne.engine.state import SessionState


class OpenChunk:
    def __init__(self, committed: SessionState, tokens: tuple[int, ...], kinds: bytes) -> None:
        self.committed = committed
        self.tokens = tokens
        self.kinds = kinds

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


class GroupedChunk(OpenChunk):
    """Sessions that decode together share one group of stacked caches, each session a row of it, so a step
    copies nothing while they stay together."""

    def __init__(
        self, committed: SessionState, tokens: tuple[int, ...], kinds: bytes, group: list[State], row: int
    ) -> None:
        super().__init__(committed, tokens, kinds)
        self.group = group
        """Per layer, name -> tensor with sessions first."""
        self.row = row


def group_of(chunks: Sequence[OpenChunk]) -> list[State]:
    """The caches of exactly these chunks in this order, stacked; to change them is to change the chunks'."""
    rows = [chunk for chunk in chunks if isinstance(chunk, GroupedChunk)]
    assert len(rows) == len(chunks), "a chunk was opened by another kind of model"
    group = rows[0].group
    size = next(iter(group[0].values())).shape[0]
    if size == len(rows) and all(c.group is group and c.row == b for b, c in enumerate(rows)):
        return group
    gathered: list[State] = []
    for layer in range(len(group)):
        names = group[layer]
        gathered.append({name: torch.stack([c.group[layer][name][c.row] for c in rows]) for name in names})
    for b, chunk in enumerate(rows):
        chunk.group, chunk.row = gathered, b
    return gathered
