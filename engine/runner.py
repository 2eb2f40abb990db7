"""Steps of the model for many sessions at once, one outcome for each. Knows no request, handle or queue.

A row that fails (a number that isn't finite, an exception) fails alone: a batch that raised is run again row
by row. That is safe because states never change in place, and open chunks can be rebuilt from their state at
any time. For the same reasons torch.OutOfMemoryError, which comes through, leaves all as it was: the same
rows, or fewer of them, can be run again. What is raised where the device is lost comes through too: no row
is at fault, and nothing would run again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mnemosyne.engine import device
from mnemosyne.engine.chunk_trace import NO_CHUNKS, ChunkTraces
from mnemosyne.engine.commits import Commit, Committed, Raised, outcomes
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.errors import EngineError, MnemosyneError
from mnemosyne.engine.ids import Ids
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.state import GENERATED, SessionState
from mnemosyne.engine.trace import Trace

log = logging.getLogger(__name__)
Row = TypeVar("Row")
Outcome = TypeVar("Outcome")
Logits = NDArray[np.float32]


class Model(Protocol):
    """What the engine needs of ``model.Titans``."""

    @property
    def config(self) -> ModelConfig: ...

    def initial_state(self) -> SessionState: ...

    def prefill(
        self, states: Sequence[SessionState], tokens: torch.Tensor, per_token: bool = False
    ) -> tuple[list[SessionState], Trace]: ...

    @property
    def beside(self) -> int:
        """Sessions that ``commit_beside`` takes at once."""
        ...

    def commit_beside(self, states: Sequence[SessionState], tokens: torch.Tensor) -> Commit:
        """``prefill`` of one chunk, on its way while the model is asked for other things; one at a time."""
        ...

    def open_chunk(self, states: Sequence[SessionState]) -> tuple[torch.Tensor, list[OpenChunk]]: ...

    def begin(self, states: Sequence[SessionState]) -> list[OpenChunk]: ...

    def decode(self, chunks: Sequence[OpenChunk], tokens: torch.Tensor) -> torch.Tensor: ...


@dataclass(eq=False)
class Decoding:
    """A session that emits tokens. ``open`` is a cache of ``state``'s pending tokens and may be dropped."""

    state: SessionState
    next: int | None = None
    """The token emitted last, not yet part of ``state``."""
    open: OpenChunk | None = None
    trace: ChunkTraces = NO_CHUNKS
    """Chunks committed since the caller last took them."""
    committing: bool = False
    """Its full chunk is on its way into a new state."""
    failed: MnemosyneError | None = None
    """Why that went wrong; ``state`` is the last good one."""


class _UnderWay(NamedTuple):
    """Rows whose full chunks are being committed."""

    rows: Sequence[Decoding]
    commit: Commit


class Runner:
    """Runs the model. Not safe for more than one thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.chunk = model.config.chunk
        self._device = next(iter(model.initial_state().tensors.values())).device
        self._under_way: _UnderWay | None = None

    @property
    def committing(self) -> bool:
        """A full chunk is on its way, wanted or not."""
        return self._under_way is not None

    def commit(
        self, states: Sequence[SessionState], ids: Sequence[Sequence[int] | Ids], per_token: bool = False
    ) -> list[Committed | MnemosyneError]:
        """Commit ``ids`` (n whole chunks, the same n for all) on top of ``states``, whose pending tokens are
        dropped: they are the first of ``ids``. ``per_token``: with the surprise of every token."""
        rows = [(_whole(state), row) for state, row in zip(states, ids, strict=True)]
        return _isolate(rows, partial(self._commit, per_token=per_token))

    def decode(self, rows: Sequence[Decoding]) -> list[Logits | MnemosyneError | None]:
        """Take each row's ``next`` in, where there is one, and give the logits [vocab] after its last token.

        None for a row whose chunk is full and isn't committed yet: it misses its turn, the others don't wait
        for it. Where there are no others, its commit is waited for."""
        self._commit_full(rows)
        answers: dict[Decoding, Logits | MnemosyneError | None] = {}
        for row in rows:
            if row.failed is not None or self.commits_next(row):
                answers[row] = row.failed
        self._begin([row for row in rows if row not in answers])
        # One that has taken its token in already did so in a step that ran out of memory after it.
        going = [row for row in rows if row.open is not None and row.next is not None and row not in answers]
        answers.update(zip(going, self._extend(going), strict=False))
        fresh = [row for row in rows if row not in answers]
        opened: list[Logits | MnemosyneError] = _isolate(fresh, self._open)
        answers.update(zip(fresh, opened, strict=True))
        return [answers[row] for row in rows]

    def commits_next(self, row: Decoding) -> bool:
        """Whether the row's chunk is full, so that its next token makes a new state."""
        return row.next is not None and row.failed is None and len(row.state.pending) == self.chunk

    def _commit(
        self, rows: Sequence[tuple[SessionState, Sequence[int] | Ids]], per_token: bool
    ) -> list[Committed | MnemosyneError]:
        states = [state for state, _ in rows]
        # torch.tensor would look at each number of them.
        tokens = torch.from_numpy(np.array([ids for _, ids in rows], np.int64)).to(self._device)
        return outcomes(states, *self._model.prefill(states, tokens, per_token), self.chunk)

    def _commit_full(self, rows: Sequence[Decoding]) -> None:
        """See that full chunks are committed, one batch of them at a time: what fills up meanwhile is the
        next batch. Waits where no row can go on without, and for what no row waits for any more."""
        while True:
            if self._under_way is not None and self._under_way.commit.ended():
                self._take_commit(rows)
            full = [row for row in rows if self.commits_next(row)]
            if self._under_way is None:
                if not full:
                    return
                self._begin_commit(full[: self._model.beside])
            elif len(full) == len(rows):
                self._take_commit(rows)
            else:
                return

    def _begin_commit(self, rows: Sequence[Decoding]) -> None:
        # On the host: a model that needs them on its device takes them there itself.
        tokens = torch.tensor([row.state.pending for row in rows], dtype=torch.long)
        commit: Commit
        try:
            commit = self._model.commit_beside([_whole(row.state) for row in rows], tokens)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            commit = Raised(error)
        self._under_way = _UnderWay(rows, commit)
        for row in rows:
            row.committing, row.open = True, None

    def _take_commit(self, here: Sequence[Decoding]) -> None:
        """When it has ended. What ran out of memory costs nobody ``here`` who has no part in it: its own rows
        begin again in a step of theirs."""
        assert self._under_way is not None
        (rows, commit), self._under_way = self._under_way, None
        for row in rows:
            row.committing = False

        def take(some: Sequence[Decoding]) -> list[Committed | MnemosyneError]:
            if len(some) == len(rows):
                states = [row.state for row in rows]
                return outcomes(states, *commit.result(), self.chunk)
            return self.commit([row.state for row in some], [row.state.pending for row in some])

        try:
            found = _isolate(rows, take)
        except torch.OutOfMemoryError:
            if set(rows).isdisjoint(here):
                return
            raise
        for row, outcome in zip(rows, found, strict=True):
            if isinstance(outcome, Committed):
                row.state, row.trace = outcome.state, outcome.trace
            else:
                row.failed = outcome

    def _begin(self, rows: Sequence[Decoding]) -> None:
        """The next chunk of those whose last one was just committed; it takes the token in beside the other
        rows'."""
        rows = [row for row in rows if row.open is None and not row.state.pending and row.next is not None]
        if not rows:
            return
        try:
            begun = self._model.begin([row.state for row in rows])
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if device.lost():
                raise
            log.exception("beginning %d chunks failed; they are opened one by one", len(rows))
            return
        for row, chunk in zip(rows, begun, strict=True):
            row.open = chunk

    def _extend(self, rows: Sequence[Decoding]) -> list[Logits]:
        """Logits of all rows, or none of them if the batch raised: the rows are then opened again, one by
        one."""
        chunks = [row.open for row in rows if row.open is not None]
        if not chunks:
            return []
        # On the host: a model that needs them on its device takes them there itself.
        tokens = torch.tensor([row.next for row in rows], dtype=torch.long)
        try:
            logits = self._model.decode(chunks, tokens)
            for row in rows:
                _take_next(row)  # while the device is busy
            answers = _rows(logits)
        except torch.OutOfMemoryError:
            for row in rows:
                row.open = None
            raise
        except Exception:
            if device.lost():
                raise
            log.exception("decoding %d sessions failed; they are opened again one by one", len(rows))
            for row in rows:
                row.open = None
            return []
        return answers

    def _open(self, rows: Sequence[Decoding]) -> list[Logits | MnemosyneError]:
        for row in rows:
            row.open = None
            _take_next(row)
        logits, chunks = self._model.open_chunk([row.state for row in rows])
        for row, chunk in zip(rows, chunks, strict=True):
            row.open = chunk
        return list(_rows(logits))


def _whole(state: SessionState) -> SessionState:
    """What a chunk is committed on top of."""
    return dataclasses.replace(state, pending=(), kinds=b"")


def _take_next(row: Decoding) -> None:
    if row.next is not None:
        pending, kinds = (*row.state.pending, row.next), row.state.kinds + bytes([GENERATED])
        row.state = dataclasses.replace(row.state, pending=pending, kinds=kinds)
        row.next = None


def _rows(logits: torch.Tensor) -> list[Logits]:
    return list(logits.detach().cpu().float().numpy())


def _isolate(
    rows: Sequence[Row], run: Callable[[Sequence[Row]], list[Outcome | MnemosyneError]]
) -> list[Outcome | MnemosyneError]:
    """``run`` on all rows; if that raises, on each alone, so that only a row at fault has an error for an
    outcome."""
    if not rows:
        return []
    try:
        return run(rows)
    except torch.OutOfMemoryError:
        raise
    except MnemosyneError as error:
        if len(rows) == 1:
            return [error]
    except Exception as error:
        if device.lost():
            raise
        log.exception("a step of %d session(s) failed", len(rows))
        if len(rows) == 1:
            return [EngineError(f"the engine failed: {type(error).__name__}: {error}")]
    return [outcome for row in rows for outcome in _isolate([row], run)]
