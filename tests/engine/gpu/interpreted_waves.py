"""Waves of cells by the kernels in Triton's interpreter, on a CPU, in fp32, against the model's modules.

``test_waves.py`` runs this in a process of its own, since triton decides when it is imported. Every program
costs milliseconds here, so models are as small as they can be and still have two heads."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mnemosyne.engine import trace
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu import reading, schedule, wave
from mnemosyne.engine.gpu.model import GpuTitans
from mnemosyne.engine.model import Titans
from mnemosyne.engine.runner import Decoding, Runner
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace
from mnemosyne.kernels.triton import rows, support
from tests.engine.gpu.compared import errors, same_bits, same_trace, told_of, trace_error
from tests.engine.gpu.opened import error, sessions, tiny
from tests.engine.models import small_model

# The interpreter computes with numpy, which warns of an infinite exp(x) and of a maximum of NaN alone.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BOUND = 1e-5
CHUNK = 16

# In MAG and MAL what attention answered reaches a state only in the layer above, and the norm of one head
# hides by what it was multiplied.
CONFIGS = {
    "mac": tiny("mac", layers=1),
    "mac, linear": tiny("mac", layers=1, head_dim=64, depth=1, clip=None, gate="paper"),
    "mag, a window longer than a cell": tiny("mag", window=64, expansion=4, gate="paper"),
    "mag, linear, a window shorter than a cell": tiny("mag", window=16, depth=1),
    "mal": tiny("mal", head_dim=64, residual=False, norm=False, clip=0.05),
    "mal, linear": tiny("mal", layers=1, head_dim=64, depth=1, norm=False, clip=0.3),
    "lmm": tiny("lmm", head_dim=64, expansion=1, clip=None),
    "lmm, linear": tiny("lmm", layers=1, depth=1, residual=False),
}


@pytest.fixture(autouse=True)
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of two chunks, and a gain of every second chunk, so that a short text has several."""
    monkeypatch.setitem(support.PRECISIONS, torch.float32, "ieee")
    monkeypatch.setattr(schedule, "BLOCK_CHUNKS", 2)
    monkeypatch.setattr(rows, "ROWS", CHUNK)
    for module in (trace, wave):
        monkeypatch.setattr(module, "GAIN_EVERY", 2)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", rows_alone)


def rows_alone(_: object, a: TensorHandle, b: TensorHandle, d: TensorHandle, *__: object) -> TensorHandle:
    """A product whose rows don't depend on their number, as on a tensor core and unlike in a BLAS."""
    each = a.data[:, None, :] * np.ascontiguousarray(b.data.T)[None]
    return TensorHandle(each.sum(-1, dtype=np.float32) + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch fills what it hands out with NaN: room, blobs, open chunks."""
    torch.use_deterministic_algorithms(True)
    assert (torch.empty(64, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)


def made(config: ModelConfig, *, tokens: int = 64, cells: int = 3) -> tuple[Titans, GpuTitans]:
    model = small_model(config)
    return model, GpuTitans(model, graphs=False, tokens=tokens, cells=cells)


def in_blobs(gpu: GpuTitans, states: Sequence[SessionState]) -> list[SessionState]:
    """The same in allocations of their own, which a call takes as they are."""
    return [
        dataclasses.replace(s, tensors=gpu.layout.views(gpu.layout.pack(s.tensors, gpu.device)))
        for s in states
    ]


def pending(state: SessionState, given: int, generated: int) -> SessionState:
    ids = tuple(range(1, 1 + given + generated))
    return dataclasses.replace(state, pending=ids, kinds=b"\0" * given + b"\1" * generated)


def text(sessions: int, chunks: int, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 79, (sessions, chunks * CHUNK), generator=g)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_to_the_modules(config: ModelConfig) -> None:
    """One session enters a segment in the middle and leaves the next one there, one begins."""
    model, gpu = made(config)
    states = in_blobs(gpu, sessions(model, [(3, 0), (0, 0)]))
    before = [state.digest() for state in states]
    want, expected = model.prefill(states, text(2, 2), per_token=True)
    got, told = gpu.prefill(states, text(2, 2), per_token=True)
    for one, other in zip(got, want, strict=True):
        assert one.position == other.position and one.pyramid.chunks == other.pyramid.chunks
        found = errors(one, other)
        assert max(found.values()) < BOUND, found
    assert trace_error(told.chunks, expected.chunks) < BOUND
    assert (told.written == expected.written).all()
    assert told.tokens is not None and expected.tokens is not None
    assert trace_error(told.tokens, expected.tokens) < BOUND
    assert told.finite is not None and told.finite.all()

    assert [state.digest() for state in states] == before


@pytest.mark.parametrize("name", ["mac", "mag, a window longer than a cell", "mal", "lmm"])
def test_an_open_chunk_and_what_is_decoded_on_it(name: str) -> None:
    model, gpu = made(CONFIGS[name])
    (state,) = in_blobs(gpu, [pending(s, 13, 0) for s in sessions(model, [(3, 0)])])
    committed = state.digest()
    logits, chunks = gpu.open_chunk([state])
    expected, opened = model.open_chunk([state])
    assert error(logits, expected) < BOUND
    assert error(gpu.decode(chunks, torch.tensor([7])), model.decode(opened, torch.tensor([7]))) < BOUND
    assert chunks[0].tokens == opened[0].tokens and chunks[0].kinds == opened[0].kinds
    assert state.digest() == committed


@pytest.mark.parametrize("config", [tiny("mac", head_dim=64), tiny("mag", head_dim=64)], ids=["mac", "mag"])
def test_the_same_bits_in_any_order_split_and_wave(config: ModelConfig) -> None:
    model, gpu = made(config)
    states = sessions(model, [(3, 0), (0, 0)])
    tokens = text(2, 2)
    want, told = gpu.prefill(states, tokens)
    reference, _ = model.prefill(states, tokens)
    assert all(max(errors(*pair).values()) < BOUND for pair in zip(want, reference, strict=True))

    # In another order; room for one chunk of each at a time.
    pieces = GpuTitans(model, graphs=False, tokens=2 * CHUNK, cells=3)
    got, other = pieces.prefill(states[::-1], tokens.flip(0))
    assert all(same_bits(*pair) for pair in zip(got[::-1], want, strict=True))
    assert same_trace(told_of(other, [1, 0]), told)

    # Alone, in two calls, layer by layer.
    single = GpuTitans(model, graphs=False, tokens=64, cells=1)
    half, first = single.prefill(states[:1], tokens[:1, :CHUNK])
    first = told_of(first, [0])  # of its own: on a CPU the next call writes where this one has told
    got, second = single.prefill(half, tokens[:1, CHUNK:])
    assert same_bits(got[0], want[0])
    assert same_trace(Trace.joined([first, second]), told_of(told, [0]))


def test_an_open_chunk_has_the_same_bits_alone_and_in_a_batch() -> None:
    """One goes on by a generated token, one is full but for one, one has read nothing."""
    model, gpu = made(tiny("mac", layers=1, head_dim=64))
    base = sessions(model, [(3, 0), (1, 0), (0, 0)])
    states = [pending(base[0], 2, 1), pending(base[1], 15, 0), base[2]]
    logits, chunks = gpu.open_chunk(states)
    reference, _ = model.open_chunk(states)
    assert error(logits[:2], reference[:2]) < BOUND and not logits[2].any()
    following = gpu.decode(chunks[:2], torch.tensor([4, 5]))
    alone, opened = gpu.open_chunk(states[1:2])
    assert torch.equal(alone[0], logits[1])
    assert torch.equal(gpu.decode(opened, torch.tensor([5]))[0], following[1])


def test_what_is_not_finite_stays_with_its_session() -> None:
    model, gpu = made(tiny("mag", layers=1))
    clean, told_nan, held_nan = in_blobs(gpu, sessions(model, [(1, 0)] * 3))
    model.embedding[79] = float("nan")
    held_nan.tensors["keys"][0, 1, -1, 3] = float("nan")
    tokens = text(3, 1)
    tokens[0, 5] = 79
    got, told = gpu.prefill([told_nan, clean, held_nan], tokens)
    assert told.finite is not None and told.finite.tolist() == [False, True, False]
    (alone,), _ = gpu.prefill([clean], tokens[1:2])
    assert same_bits(got[1], alone)


def test_a_commit_beside_decode_has_the_bits_of_prefill() -> None:
    """It is launched by the decode of another session, or when its result is asked for."""
    model, gpu = made(tiny("mac", head_dim=64))
    *states, other = sessions(model, [(3, 0), (0, 0), (1, 2)])
    before, tokens = [state.digest() for state in states], text(2, 1)
    want, expected = gpu.prefill(states, tokens)
    _, opened = gpu.open_chunk([other])
    for launched in (True, False):
        commit = gpu.commit_beside(states, tokens)
        assert not commit.ended()
        if launched:
            gpu.decode(opened, torch.tensor([5]))
            assert commit.ended()
            gpu.prefill(states[::-1], tokens.flip(0))  # in room of its own
        got, told = commit.result()
        assert all(same_bits(*pair) for pair in zip(got, want, strict=True))
        assert same_trace(told, expected) and told.finite is not None and told.finite.all()
    assert [state.digest() for state in states] == before


def test_what_a_launch_raises_is_told_by_the_commit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = made(tiny("lmm", layers=1))
    state, other = sessions(model, [(1, 0), (1, 2)])
    _, opened = gpu.open_chunk([other])
    commit = gpu.commit_beside([state], text(1, 1))

    def failing(*_: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patched:
        patched.setattr(reading.Reader, "read", failing)
        gpu.decode(opened, torch.tensor([5]))
    assert commit.ended()
    with pytest.raises(RuntimeError, match="boom"):
        commit.result()
    (want,), _ = gpu.prefill([state], text(1, 1))
    again = gpu.commit_beside([state], text(1, 1))
    assert same_bits(again.result()[0][0], want)


def test_a_commit_is_kept_by_nobody_but_who_began_it() -> None:
    """Its states old and new are most of a device's memory."""
    model, gpu = made(tiny("lmm", layers=1))
    commit = gpu.commit_beside(sessions(model, [(1, 0)]), text(1, 1))
    commit.result()
    there = weakref.ref(commit)
    del commit
    assert there() is None


def test_a_session_whose_chunk_is_committed_beside_another_decodes_as_alone() -> None:
    model, gpu = made(tiny("lmm", layers=1))
    base = sessions(model, [(1, 0), (0, 0)])
    states = [pending(base[0], 15, 0), pending(base[1], 2, 1)]

    def decoded(some: Sequence[SessionState]) -> tuple[list[list[Tensor]], int]:
        """Logits of four turns of each, and how many turns were missed."""
        runner, rows, missed = Runner(gpu), [Decoding(state) for state in some], 0
        logits: list[list[Tensor]] = [[] for _ in rows]
        while any(len(told) < 4 for told in logits):
            for row, told, outcome in zip(rows, logits, runner.decode(rows), strict=True):
                if outcome is None:
                    missed += 1
                    continue
                assert isinstance(outcome, np.ndarray), outcome
                told.append(torch.from_numpy(outcome))
                row.next = int(outcome.argmax())
        return logits, missed

    together, missed = decoded(states)
    assert missed == 1
    for state, logits in zip(states, together, strict=True):
        (alone,), missed = decoded([state])
        assert missed == 0
        assert all(torch.equal(*pair) for pair in zip(alone[:4], logits[:4], strict=True))
