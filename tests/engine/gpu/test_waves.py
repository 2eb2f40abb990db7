"""Prefill in waves of cells: in the interpreter on any machine, and on a GPU in bf16, by its bits."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from mnemosyne.engine.config import MemoryConfig, ModelConfig, Variant
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.trace import Trace
from tests.engine.gpu.compared import errors, same_bits, same_trace, told_of, trace_error
from tests.engine.gpu.opened import error, sessions
from tests.engine.models import VARIANTS, small_model
from tests.kernels.triton.interpreter import passes_in_the_interpreter

if TYPE_CHECKING:
    from mnemosyne.engine.gpu.model import GpuTitans

CHUNK = 64
BOUNDS = {"memory": 0.012, "momentum": 0.036, "": 0.024}
"""Of a tensor by its kind; three times what was measured after 192 tokens."""
PLACES = (0, 1, 7, 9)
"""Chunks that sessions of a batch have read: none, some, a segment's last to come, into the next segment."""
CELLS = 24


@pytest.mark.timeout(300)
@pytest.mark.interpreted("interpreted_waves.py")
def test_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    passes_in_the_interpreter(request.node)


@cache
def model_of(variant: Variant, depth: int = 2, layers: int = 3, *, strong: bool = True) -> Titans:
    """Heads and chunks as the presets have them. ``strong``: with gates that open and close from token to
    token, else as a model begins, which is what bounds were measured of."""
    config = ModelConfig(
        variant=variant,
        layers=layers,
        dim=256,
        vocab_size=128,
        persistent=128,
        memory=MemoryConfig(expansion=4, depth=depth),
    )
    if strong:
        return small_model(config, torch.bfloat16).cuda()
    torch.manual_seed(1)
    return Titans(config).prepare(torch.bfloat16).cuda()


def served(model: Titans, *, graphs: bool = True, tokens: int = 65_536, cells: int = CELLS) -> GpuTitans:
    """In room full of NaN."""
    from mnemosyne.engine.gpu.model import GpuTitans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of products that cuBLAS may sum in any order: only NaN is wanted
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert (torch.empty(64, dtype=torch.uint8, device="cuda") == 255).all()
            return GpuTitans(model, graphs=graphs, tokens=tokens, cells=cells)
        finally:
            torch.use_deterministic_algorithms(False)


@cache
def usual(variant: Variant) -> GpuTitans:
    return served(model_of(variant))


def text(rows: int, chunks: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 127, (rows, chunks * CHUNK), generator=g)


def standing(gpu: GpuTitans, count: int) -> list[SessionState]:
    """Sessions at all ``PLACES`` in turn, each with a history of its own."""
    states = [gpu.initial_state()] * count
    for i, place in enumerate(PLACES):
        which = range(i, count, len(PLACES))
        if place and len(which):
            read, _ = gpu.prefill([states[b] for b in which], text(len(which), place, seed=i))
            for b, state in zip(which, read, strict=True):
                states[b] = state
    return states


def pending(state: SessionState, given: int, generated: int = 0) -> SessionState:
    ids = tuple(1 + i % 90 for i in range(given + generated))
    return dataclasses.replace(state, pending=ids, kinds=b"\0" * given + b"\1" * generated)


def check_same(
    got: Sequence[SessionState], told: Trace, want: Sequence[SessionState], expected: Trace
) -> None:
    assert all(same_bits(*pair) for pair in zip(got, want, strict=True))
    assert same_trace(told, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_near_the_modules(variant: Variant, depth: int) -> None:
    """Sessions at the beginning, in the middle and at the end of a segment; then an open chunk, decoded."""
    model = model_of(variant, depth, strong=False)
    gpu = served(model)
    states = sessions(model, [(place, 0) for place in PLACES])
    before = [state.digest() for state in states]
    want, expected = model.prefill(states, text(4, 3).cuda(), per_token=True)
    got, told = gpu.prefill(states, text(4, 3), per_token=True)
    for one, other in zip(got, want, strict=True):
        assert one.position == other.position
        found = errors(one, other)
        print(variant, depth, {name: round(value, 5) for name, value in found.items()})
        for name, value in found.items():
            kind = name.removeprefix("segment_").partition(".")[0]
            assert value < BOUNDS.get(kind, BOUNDS[""]), (name, value)
    assert told.finite is not None and told.finite.all()
    assert told.tokens is not None and expected.tokens is not None
    assert trace_error(told.chunks[..., :3], expected.chunks[..., :3]) < 0.05
    assert trace_error(told.tokens, expected.tokens) < 0.2
    assert (told.written == expected.written).all()
    assert [state.digest() for state in states] == before

    opened = [pending(want[0], 1), pending(want[1], 64), pending(want[2], 40, 3), pending(want[3], 0, 1)]
    logits, chunks = gpu.open_chunk(opened)
    expected_logits, others = model.open_chunk(opened)
    assert error(logits, expected_logits) < 4e-2
    left = [0, 2, 3]
    ids = torch.tensor([5, 6, 7])
    logits = gpu.decode([chunks[b] for b in left], ids)
    assert error(logits, model.decode([others[b] for b in left], ids)) < 4e-2


@pytest.mark.gpu
def test_every_64th_gain_is_measured() -> None:
    model = model_of("lmm", 2, 1, strong=False)
    _, expected = model.prefill([model.initial_state()], text(1, 130).cuda())
    _, told = served(model).prefill([model.initial_state()], text(1, 130))
    gains, wanted = told.chunks[0, :, 0, 3], expected.chunks[0, :, 0, 3]
    assert [i for i, gain in enumerate(gains) if gain == gain] == [63, 127]
    assert abs(gains[[63, 127]] / wanted[[63, 127]] - 1).max() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_in_any_batch(variant: Variant) -> None:
    gpu = usual(variant)
    states, tokens = standing(gpu, 256), text(256, 3, seed=9)
    watched = [0, 1, 2, 3, 100, 255]
    alone = {b: gpu.prefill([states[b]], tokens[b : b + 1]) for b in watched}
    g = torch.Generator().manual_seed(1)
    for size in (2, 3, 17, 64, 256):
        others = [b for b in torch.randperm(256, generator=g).tolist() if b not in watched]
        batch = (watched + others)[:size] if size > 6 else watched[-size:]
        batch = [batch[i] for i in torch.randperm(size, generator=g).tolist()]
        got, told = gpu.prefill([states[b] for b in batch], tokens[batch])
        for at, b in enumerate(batch):
            if b in watched:
                check_same([got[at]], told_of(told, [at]), *alone[b])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_by_any_split_graph_and_wave(variant: Variant) -> None:
    gpu = usual(variant)
    states, tokens = standing(gpu, 4), text(4, 19, seed=5)
    before = [state.digest() for state in states]
    want, expected = gpu.prefill(states, tokens)
    for cuts in ([1] * 19, [2, 9, 1, 7], [8, 8, 3], [13, 6]):
        got, parts = list(states), []
        for piece in tokens.split([cut * CHUNK for cut in cuts], 1):
            got, told = gpu.prefill(got, piece)
            parts.append(told)
        check_same(got, Trace.joined(parts), want, expected)
    model = model_of(variant)
    for other in (
        served(model, graphs=False),
        served(model, cells=1),
        served(model, graphs=False, tokens=4 * 5 * CHUNK, cells=3),
    ):
        check_same(*other.prefill(states, tokens), want, expected)
    # Once more by the graphs that the first calls captured.
    check_same(*gpu.prefill(states, tokens), want, expected)
    assert [state.digest() for state in states] == before


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_open_chunk_has_the_same_bits_in_any_batch(variant: Variant) -> None:
    gpu, eager = usual(variant), served(model_of(variant), graphs=False)
    kinds = [(1, 0), (63, 0), (0, 2), (40, 3), (17, 0)]
    states = [pending(s, *kinds[b % 5]) for b, s in enumerate(standing(gpu, 64))]
    before = [state.digest() for state in states]
    ids = torch.arange(64) % 90

    def answered(by: GpuTitans, batch: list[int]) -> torch.Tensor:
        """Logits after what is pending, and after one more token."""
        logits, chunks = by.open_chunk([states[b] for b in batch])
        return torch.stack([logits, by.decode(chunks, ids[batch])])

    whole = answered(gpu, list(range(64)))
    assert torch.isfinite(whole).all()
    assert torch.equal(answered(eager, list(range(64))), whole)
    g = torch.Generator().manual_seed(2)
    for size in (1, 1, 2, 3, 17, 33):
        batch = torch.randperm(64, generator=g)[:size].tolist()
        assert torch.equal(answered(gpu, batch), whole[:, batch])
    assert [state.digest() for state in states] == before


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_finite_stays_with_its_session(variant: Variant) -> None:
    model = small_model(model_of(variant).config, torch.bfloat16).cuda()
    gpu = served(model)
    states, tokens = standing(gpu, 4), text(4, 10, seed=6)
    want, expected = gpu.prefill(states, tokens)
    assert expected.finite is not None and expected.finite.all()
    model.embedding[127] = float("nan")
    hurt = tokens.clone()
    hurt[2, 300] = 127
    got, told = gpu.prefill(states, hurt)
    assert told.finite is not None and told.finite.tolist() == [True, True, False, True]
    sound = [0, 1, 3]
    check_same(
        [got[b] for b in sound], told_of(told, sound), [want[b] for b in sound], told_of(expected, sound)
    )
