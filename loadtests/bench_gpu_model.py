"""The model that is measured, with random weights, and the checks before its numbers count. Knows no table.

What serves on a CUDA device is ``engine.gpu``; ``engine.model.Titans`` in float32, with the same weights, is
what it is held to. Bits of a session are compared alone, among others, and in pieces.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bench_gpu_card import Card
from bench_presets import config_of
from bench_report import CheckFailed
from torch import Tensor

from mnemosyne.engine.config import ModelConfig, Variant
from mnemosyne.engine.model import Titans
from mnemosyne.engine.runner import Model
from mnemosyne.engine.state import INPUT, SessionState

AS_FAR, LEAST_FAR, TOO_FAR = 2.0, 1e-3, 0.25
"""The served path may be as many times as far from float32 as the plain one in the same precision, with a
floor for what is exact; where even that one is too far, a comparison says nothing."""
NEIGHBOURS, STEPS = 4, 3


@dataclass(frozen=True)
class Subject:
    """A model that passed its checks."""

    name: str
    preset: str
    config: ModelConfig
    model: Model
    parameters: int
    state_bytes: int
    """On the device, of one session."""
    card: Card
    path: str
    """The module of what serves: of the kernels, or of the plain model where they can't."""
    distances: dict[str, float]
    """To float32, relative: of logits and of what the memory learned; served, and by the plain model."""

    @property
    def operand(self) -> int:
        """Bytes of a number in the compute precision."""
        return self.card.compute.itemsize


@dataclass(frozen=True)
class Reading:
    states: list[SessionState]
    tokens: int
    """Of each session."""
    windows: list[Window]
    written: float
    """Of the chunks, the share that changed any cell of the memory."""

    @property
    def seconds(self) -> float:
        return sum(window.seconds for window in self.windows)


@dataclass(frozen=True)
class Window:
    """One call of a reading."""

    end: int
    """Tokens of each session up to here."""
    tokens: int
    seconds: float
    allocated: int
    """Bytes of the device's memory in use after it."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def make(name: str, variant: Variant, card: Card) -> Subject:
    """Build and check. Raises CheckFailed."""
    config = config_of(name, variant)
    torch.manual_seed(0)
    with torch.device(card.device):
        titans = Titans(config)
    ids = tokens_of(config, config.segment + 2 * config.chunk + config.chunk // 2, seed=1)
    exact = _outcome(titans.prepare(torch.float32), ids)
    plain = _outcome(titans.prepare(card.compute), ids)
    model, path = _served(titans, card)
    start = titans.initial_state()
    plain_far = _distances(plain, exact, start)
    far = _distances(_outcome(model, ids), exact, start)
    _check_distances(far, plain_far)
    subject = Subject(
        name=f"{name} {variant.upper()}",
        preset=name,
        config=config,
        model=model,
        parameters=titans.parameter_count(),
        state_bytes=sum(tensor.nbytes for tensor in model.initial_state().tensors.values()),
        card=card,
        path=path,
        distances=far | {f"{what} (plain)": value for what, value in plain_far.items()},
    )
    _check_isolation(subject)
    return subject


def tokens_of(config: ModelConfig, count: int, seed: int) -> Tensor:
    """`[count]` random ids, on the host."""
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def some_tokens(config: ModelConfig, sessions: int, count: int, seed: int) -> Tensor:
    """`[sessions, count]` random ids, on the host."""
    return tokens_of(config, sessions * count, seed).view(sessions, count)


def pending(state: SessionState, ids: Sequence[int]) -> SessionState:
    """The state with ``ids`` as input after its last commit."""
    return dataclasses.replace(state, pending=tuple(ids), kinds=bytes([INPUT]) * len(ids))


def read_on(
    subject: Subject, states: Sequence[SessionState], ids: Tensor, piece: int, until: float
) -> Reading:
    """The sessions read their rows of ``ids`` `[B, T]`, T whole chunks, ``piece`` tokens a call; they stop
    after the call that passes ``until`` (``time.perf_counter``). Raises CheckFailed where a state stops being
    finite."""
    card, held = subject.card, list(states)
    windows: list[Window] = []
    changed = chunks = read = 0
    for part in ids.split(piece, 1):
        there = part.to(card.device)
        card.wait()
        began = time.perf_counter()
        held, trace = subject.model.prefill(held, there)
        card.wait()
        ended = time.perf_counter()
        read += part.shape[1]
        windows.append(Window(read, part.numel(), ended - began, card.allocated()))
        changed += int((trace.written > 0).sum())
        chunks += trace.written.size
        if ended > until:
            break
    check_finite(held)
    return Reading(held, read, windows, changed / chunks)


def check_finite(states: Sequence[SessionState]) -> None:
    """Raises CheckFailed."""
    for state in states:
        for name, tensor in state.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckFailed(f"after {state.position:,} tokens {name} isn't finite")


def check_same(found: SessionState, expected: SessionState, where: str) -> None:
    """Bit for bit. Raises CheckFailed."""
    different = [name for name, t in expected.tensors.items() if not torch.equal(t, found.tensors[name])]
    if found.position != expected.position or found.pending != expected.pending:
        different.append("position")
    if found.pyramid.array().tobytes() != expected.pyramid.array().tobytes():
        different.append("pyramid")
    if different:
        raise CheckFailed(f"isolation: a session alone and {where} differs in {', '.join(different)}")


def _served(titans: Titans, card: Card) -> tuple[Model, str]:
    """What an engine would serve with, and the module that it is of."""
    if card.trial:
        return titans, type(titans).__module__
    from mnemosyne.engine.gpu.choice import served

    model = served(titans)
    return model, type(model).__module__


@dataclass(frozen=True)
class _Outcome:
    logits: Tensor
    memory: list[Tensor]


def _outcome(model: Model, ids: Tensor) -> _Outcome:
    """The state after whole chunks, and the logits after the rest and after one decoded token."""
    device = next(iter(model.initial_state().tensors.values())).device
    whole = len(ids) // model.config.chunk * model.config.chunk
    (state,), _ = model.prefill([model.initial_state()], ids[None, :whole].to(device))
    first, chunks = model.open_chunk([pending(state, ids[whole:].tolist())])
    second = model.decode(chunks, torch.tensor([1], device=device))
    names = (f"memory.{i}" for i in range(model.config.memory.depth))
    return _Outcome(torch.cat([first, second]).float(), [state.tensors[name].float() for name in names])


def _distances(found: _Outcome, exact: _Outcome, start: SessionState) -> dict[str, float]:
    begun = [start.tensors[f"memory.{i}"] for i in range(len(exact.memory))]
    learned = [(e - s).norm() for e, s in zip(exact.memory, begun, strict=True)]
    missed = [(f - e).norm() for f, e in zip(found.memory, exact.memory, strict=True)]
    return {
        "logits": float((found.logits - exact.logits).norm() / exact.logits.norm()),
        "memory": max(float(m / n) for m, n in zip(missed, learned, strict=True)),
    }


def _check_distances(found: dict[str, float], plain: dict[str, float]) -> None:
    for what, distance in found.items():
        if not plain[what] <= TOO_FAR:
            raise CheckFailed(f"{what}: plain is {plain[what]:.2g} from float32, too far to compare with")
        if not distance <= max(AS_FAR * plain[what], LEAST_FAR):
            raise CheckFailed(
                f"{what}: {distance:.2g} from float32, the plain path in the same precision {plain[what]:.2g}"
            )


def _check_isolation(subject: Subject) -> None:
    """Sessions at different places: alone, among others in another order, and a chunk at a time; then token
    by token."""
    config, model, device = subject.config, subject.model, subject.card.device
    chunk = config.chunk
    states = []
    for i in range(NEIGHBOURS):
        state = model.initial_state()
        if i:
            (state,), _ = model.prefill([state], some_tokens(config, 1, i * chunk, seed=10 + i).to(device))
        states.append(state)
    ids = some_tokens(config, NEIGHBOURS, 3 * chunk, seed=20).to(device)
    order = list(range(1, NEIGHBOURS)) + [0]
    shuffled, _ = model.prefill([states[i] for i in order], ids[order])
    together = dict(zip(order, shuffled, strict=True))
    alone = []
    for i, state in enumerate(states):
        (whole,), _ = model.prefill([state], ids[i : i + 1])
        check_same(together[i], whole, "among others")
        pieces = state
        for part in ids[i : i + 1].split(chunk, 1):
            (pieces,), _ = model.prefill([pieces], part)
        check_same(pieces, whole, "in pieces")
        alone.append(whole)
    opened = [pending(state, range(1, i + 2)) for i, state in enumerate(alone)]
    among = _decoded(model, [opened[i] for i in order], device)
    for place, i in enumerate(order):
        if not torch.equal(among[:, place], _decoded(model, [opened[i]], device)[:, 0]):
            raise CheckFailed("isolation: a session's logits alone and among others differ")


def _decoded(model: Model, states: list[SessionState], device: torch.device) -> Tensor:
    """`[1 + STEPS, B, vocab]`: logits after what is pending, and after the same tokens for each."""
    logits, chunks = model.open_chunk(states)
    rows = [logits]
    for step in range(STEPS):
        rows.append(model.decode(chunks, torch.full((len(states),), step + 2, device=device)))
    return torch.stack(rows)
