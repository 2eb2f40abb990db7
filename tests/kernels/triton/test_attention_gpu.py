"""Attention that shares keys and values on the chip, beside the kernel for any shape; and its bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
L, D, P, HELD, HEADS, LAYERS, CHUNKS = 64, 64, 128, 512, 4, 2, 8
DIM = HEADS * D
STRIDE = HEADS * HELD * D * 2
KEYS, VALUES, H_KEYS, H_VALUES = ((i * LAYERS * STRIDE, STRIDE) for i in range(4))
BOUND = 0.01
"""Relative, of all numbers of a chunk together."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """One session a row: ``older`` chunks come before the ``chunks`` that are asked about."""

    segment: bool
    older: tuple[int, ...]
    chunks: tuple[int, ...]
    x: Tensor
    h: Tensor
    persistent: tuple[Tensor, Tensor]
    states: tuple[Tensor, ...]

    def answers(
        self, which: Sequence[int], cuts: Sequence[int] = (0, CHUNKS), cell: int = CHUNKS * L
    ) -> Tensor:
        """Of some sessions `[sessions, CHUNKS L, DIM]`, NaN where there is no chunk. Between one cut and the
        next the states keep what was seen."""
        from mnemosyne.kernels.triton import attention

        at = list(which)
        states = [self.states[i].clone() for i in at]
        held, held_h = attention.Held(KEYS, VALUES), attention.Held(H_KEYS, H_VALUES)
        found = torch.full((len(at), CHUNKS * L, DIM), float("nan"), dtype=torch.bfloat16, device="cuda")
        for first, end in zip(cuts, cuts[1:], strict=False):
            counts = [max(min(self.chunks[i], end) - first, 0) for i in at]
            columns = [
                [i % LAYERS, counted, 0, state.data_ptr(), (self.older[i] + first) * L, 0, counted * L]
                for i, counted, state in zip(at, counts, states, strict=True)
            ]
            cells = torch.tensor(columns).T.contiguous().cuda()
            x, h = (self._rows(rows[at], first * L, cell) for rows in (self.x, self.h))
            out = torch.full((len(at) * cell, DIM), float("nan"), dtype=torch.bfloat16, device="cuda")
            attention.attend(
                x,
                DIM,
                h if self.segment else None,
                *self.persistent,
                out,
                held,
                held_h if self.segment else None,
                HELD,
                cells,
                cell,
                L,
            )
            own = out.view(len(at), cell, DIM)
            for row, counted in enumerate(counts):
                found[row, first * L : (first + counted) * L] = own[row, : counted * L]
                assert own[row, counted * L :].isnan().all()
            kept = [(x, 2 * DIM, 3 * DIM, held), (h, 0, DIM, held_h)]
            for rows, keys, values, where in kept[: 1 + self.segment]:
                attention.keep(rows, keys, values, where, HELD, self.segment, cells, cell, L, D, DIM)
        return found

    def _rows(self, x: Tensor, first: int, cell: int) -> Tensor:
        room = x.new_full((x.shape[0], cell, x.shape[2]), float("nan"))
        part = x[:, first : first + cell]
        room[:, : part.shape[1]] = part
        return room.flatten(0, 1)


def made(segment: bool) -> Texts:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16().cuda()

    older = (0, 0, 0, 8, 2, 5, 0, 7) if segment else (0, 0, 8, 2, 31, 16, 1, 7)
    chunks = (8, 3, 0, 8, 6, 3, 1, 1) if segment else (8, 3, 8, 8, 8, 0, 7, 1)
    states = []
    for before in older:
        state = normal(4, LAYERS, HEADS, HELD, D)
        if segment:
            state[:, :, :, before % 8 * L :] = float("nan")
        else:
            state[:, :, :, : HELD - min(before, 8) * L] = float("nan")
        states.append(state)
    n = len(older)
    persistent = (normal(LAYERS, HEADS, P, D), normal(LAYERS, HEADS, P, D))
    x, h = normal(n, CHUNKS * L, 4 * DIM), normal(n, CHUNKS * L, 2 * DIM)
    return Texts(segment, older, chunks, x, h, persistent, tuple(states))


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.contiguous().view(torch.int16), want.contiguous().view(torch.int16))


@pytest.mark.parametrize("segment", [True, False])
def test_near_the_kernel_for_any_shape(segment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mnemosyne.kernels.triton import attention

    texts = made(segment)
    assert attention.shared is not None and attention.shared.serves(texts.x, texts.persistent[0], L, segment)
    got = texts.answers(range(len(texts.older)))
    monkeypatch.setattr(attention, "shared", None)
    want = texts.answers(range(len(texts.older)))
    for i, counted in enumerate(texts.chunks):
        for c in range(counted):
            mine, theirs = (x[i, c * L : (c + 1) * L].double() for x in (got, want))
            assert (mine - theirs).norm() < BOUND * theirs.norm(), (i, c)


@pytest.mark.parametrize("span", [1, 3, 10**9])
@pytest.mark.parametrize("segment", [True, False])
def test_the_same_bits_alone_and_by_any_split(
    segment: bool, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnemosyne.kernels.triton import attention_shared

    texts = made(segment)
    everyone = range(len(texts.older))
    whole = texts.answers(everyone)
    monkeypatch.setattr(attention_shared, "SPAN", span)
    assert same(texts.answers(everyone), whole)
    assert same(texts.answers(everyone, range(CHUNKS + 1), L), whole)
    assert same(texts.answers(everyone, (0, 3, 8)), whole)
    assert same(texts.answers(everyone, (0, 1, 3, 5, 6, 8), 2 * L), whole)
    for i in everyone:
        assert same(texts.answers([i]), whole[i : i + 1])


@pytest.mark.parametrize("segment", [True, False])
def test_what_is_not_finite_stays_with_its_session(segment: bool) -> None:
    texts = made(segment)
    others = [i for i in range(len(texts.older)) if i != 4]
    want = texts.answers(range(len(texts.older)))
    texts.x[4, 70, DIM + 10] = float("nan")
    found = texts.answers(range(len(texts.older)))
    assert found[4, 70].isnan().any() and not found[4, :64].isnan().any()
    assert same(found[others], want[others])
