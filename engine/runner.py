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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mnemosyne.engine import device
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.errors import EngineError, MnemosyneError, NotFinite
from mnemosyne.engine.messages import ChunkTrace
from mnemosyne.engine.open_chunk import OpenChunk
from mnemosyne.engine.pyramid import Values, overall
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

    def open_chunk(self, states: Sequence[SessionState]) -> tuple[torch.Tensor, list[OpenChunk]]: ...

    def begin(self, states: Sequence[SessionState]) -> list[OpenChunk]: ...

    def decode(self, chunks: Sequence[OpenChunk], tokens: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Committed:
    """A state after one or more chunks more, nothing pending."""

    state: SessionState
    trace: tuple[ChunkTrace, ...]
    tokens: Values | None = None
    """Where asked for, `[tokens, layers, 2]`: surprise and momentary of every token."""


@dataclass(eq=False)
class Decoding:
    """A session that emits tokens. ``open`` is a cache of ``state``'s pending tokens and may be dropped."""

    state: SessionState
    next: int | None = None
    """The token emitted last, not yet part of ``state``."""
    open: OpenChunk | None = None
    trace: list[ChunkTrace] = field(default_factory=list)
    """Chunks committed since the caller last took them."""


class Runner:
    """Runs the model. Not safe for more than one thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.chunk = model.config.chunk
        self._device = next(iter(model.initial_state().tensors.values())).device

    def commit(
        self, states: Sequence[SessionState], ids: Sequence[tuple[int, ...]], per_token: bool = False
    ) -> list[Committed | MnemosyneError]:
        """Commit ``ids`` (n whole chunks, the same n for all) on top of ``states``, whose pending tokens are
        dropped: they are the first of ``ids``. ``per_token``: with the surprise of every token."""
        rows = [
            (dataclasses.replace(state, pending=(), kinds=b""), row)
            for state, row in zip(states, ids, strict=True)
        ]
        return _isolate(rows, partial(self._commit, per_token=per_token))

    def decode(self, rows: Sequence[Decoding]) -> list[Logits | MnemosyneError]:
        """Take each row's ``next`` in, where there is one, and give the logits [vocab] after its last
        token."""
        failed: dict[Decoding, MnemosyneError] = {}
        full = [row for row in rows if self.commits_next(row)]
        for row, outcome in zip(full, self._commit_full(full), strict=True):
            if isinstance(outcome, MnemosyneError):
                failed[row] = outcome
        logits: dict[Decoding, Logits] = {}
        # One that has taken its token in already did so in a step that ran out of memory after it.
        going = [row for row in rows if row.open is not None and row.next is not None and row not in failed]
        logits.update(zip(going, self._extend(going), strict=False))
        fresh = [row for row in rows if row not in failed and row not in logits]
        for row, answer in zip(fresh, _isolate(fresh, self._open), strict=True):
            if isinstance(answer, MnemosyneError):
                failed[row] = answer
            else:
                logits[row] = answer
        return [failed[row] if row in failed else logits[row] for row in rows]

    def commits_next(self, row: Decoding) -> bool:
        """Whether the row's chunk is full, so that its next step makes a new state."""
        return row.next is not None and len(row.state.pending) == self.chunk

    def _commit(
        self, rows: Sequence[tuple[SessionState, tuple[int, ...]]], per_token: bool
    ) -> list[Committed | MnemosyneError]:
        states = [state for state, _ in rows]
        tokens = torch.tensor([ids for _, ids in rows], dtype=torch.long, device=self._device)
        after, trace = self._model.prefill(states, tokens, per_token)
        means = overall(trace.chunks)
        outcomes: list[Committed | MnemosyneError] = []
        finite = _finite(after) if trace.finite is None else trace.finite
        for i, (old, new) in enumerate(zip(states, after, strict=True)):
            if not finite[i]:
                outcomes.append(
                    NotFinite(
                        f"the memory stopped being finite between tokens {old.position} and {new.position}"
                    )
                )
                continue
            chunks = tuple(
                _told(old.position + (k + 1) * self.chunk, values, written)
                for k, (values, written) in enumerate(
                    zip(means[i].tolist(), trace.written[i].tolist(), strict=True)
                )
            )
            outcomes.append(Committed(new, chunks, None if trace.tokens is None else trace.tokens[i]))
        return outcomes

    def _commit_full(self, rows: Sequence[Decoding]) -> list[Committed | MnemosyneError]:
        """The token after a full chunk has come: commit the chunk and begin the next one, which takes that
        token in beside the other rows'."""
        if not rows:
            return []
        outcomes = self.commit([row.state for row in rows], [row.state.pending for row in rows])
        committed = []
        for row, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, Committed):
                row.state = outcome.state
                row.trace = list(outcome.trace)
                row.open = None
                committed.append(row)
        if committed:
            try:
                begun = self._model.begin([row.state for row in committed])
            except torch.OutOfMemoryError:
                raise
            except Exception:
                if device.lost():
                    raise
                log.exception("beginning %d chunks failed; they are opened one by one", len(committed))
                return outcomes
            for row, chunk in zip(committed, begun, strict=True):
                row.open = chunk
        return outcomes

    def _extend(self, rows: Sequence[Decoding]) -> list[Logits]:
        """Logits of all rows, or none of them if the batch raised: the rows are then opened again, one by
        one."""
        chunks = [row.open for row in rows if row.open is not None]
        if not chunks:
            return []
        # On the host: a model that needs them on its device takes them there itself.
        tokens = torch.tensor([row.next for row in rows], dtype=torch.long)
        try:
            logits = _rows(self._model.decode(chunks, tokens))
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
        for row in rows:
            _take_next(row)
        return logits

    def _open(self, rows: Sequence[Decoding]) -> list[Logits | MnemosyneError]:
        for row in rows:
            row.open = None
            _take_next(row)
        logits, chunks = self._model.open_chunk([row.state for row in rows])
        for row, chunk in zip(rows, chunks, strict=True):
            row.open = chunk
        return list(_rows(logits))


def _told(position: int, values: Sequence[float], written: float) -> ChunkTrace:
    surprise, momentary, moved, gain = values
    return ChunkTrace(
        position=position,
        surprise=surprise,
        momentary=momentary,
        moved=moved,
        gain=None if math.isnan(gain) else gain,
        written=written,
    )


def _take_next(row: Decoding) -> None:
    if row.next is not None:
        pending, kinds = (*row.state.pending, row.next), row.state.kinds + bytes([GENERATED])
        row.state = dataclasses.replace(row.state, pending=pending, kinds=kinds)
        row.next = None


def _rows(logits: torch.Tensor) -> list[Logits]:
    return list(logits.detach().float().cpu().numpy())


def _finite(states: Sequence[SessionState]) -> list[bool]:
    """Whether all of each state's values are finite: a sum is finite only if every term is, and costs one
    pass."""
    sums = torch.stack(
        [torch.stack([t.sum(dtype=torch.float32) for t in state.tensors.values()]) for state in states]
    )
    return [bool(ok) for ok in torch.isfinite(sums).all(dim=1).tolist()]


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
