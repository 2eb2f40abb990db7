"""Products of whole cells beside those of any cells: the same bits, in every row that a token has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CELL, L, LAYERS = 512, 64, 3
COUNTS = (8, 3, 0, 1, 8, 5, 2)
"""Chunks of the cells."""


@pytest.fixture
def table() -> Tensor:
    n = len(COUNTS)
    made = torch.zeros(7, n, dtype=torch.int64)
    made[0] = torch.arange(n) % LAYERS
    made[1] = torch.tensor(COUNTS)
    made[2] = torch.arange(n) * CELL
    return made.cuda()


def rows(x: Tensor, *, live: bool = True) -> list[Tensor]:
    """Of each cell: those that tokens have, or the others."""
    ends = [(i * CELL, i * CELL + n * L, (i + 1) * CELL) for i, n in enumerate(COUNTS)]
    return [x[first:end] if live else x[end:last] for first, end, last in ends]


@pytest.mark.parametrize("span", [1, 4, 10**9])
@pytest.mark.parametrize(
    ("kind", "N", "K"),
    [("store", 768, 768), ("store", 128, 64), ("swiglu", 2048, 768), ("add", 768, 2048), ("add", 1536, 320)],
)
def test_the_same_bits(
    table: Tensor, kind: str, N: int, K: int, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnemosyne.kernels.triton import gemm, gemm_whole

    torch.manual_seed(0)
    monkeypatch.setattr(gemm_whole, "SPAN", span)
    n = len(COUNTS)
    a = torch.randn(n * CELL, K, device="cuda").bfloat16()
    weight = torch.randn(LAYERS, N * (1 + (kind == "swiglu")), K, device="cuda").bfloat16()
    form = torch.float32 if kind == "add" else torch.bfloat16
    start = torch.randn(n * CELL, N, device="cuda").to(form)
    expected, found = start.clone(), start.clone()
    assert gemm_whole.serves(a, N, CELL, None)
    gemm_whole.gemm(a, weight, table, CELL, L, found, kind)
    monkeypatch.setattr(gemm, "whole", None)
    gemm.gemm(a, weight, table, CELL, L, expected, kind)
    assert all(map(torch.equal, rows(found), rows(expected)))
    if kind == "add":
        assert all(map(torch.equal, rows(found, live=False), rows(start, live=False)))


def test_what_rotates_has_the_bits_of_a_product_rotated_afterwards(
    table: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnemosyne.kernels.triton import gemm, gemm_whole
    from mnemosyne.kernels.triton.streams import Rotation

    torch.manual_seed(0)
    n, d = len(COUNTS), 256
    a = torch.randn(n * CELL, d, device="cuda").bfloat16()
    weight = torch.randn(LAYERS, 4 * d, d, device="cuda").bfloat16()
    cos, sin = (torch.randn(n * CELL, 32, device="cuda") for _ in range(2))
    rotation = Rotation(d, 2 * d // 64, cos, sin)
    found, expected = (torch.empty(n * CELL, 4 * d, device="cuda").bfloat16() for _ in range(2))
    assert gemm_whole.serves(a, 4 * d, CELL, rotation)
    gemm_whole.gemm(a, weight, table, CELL, L, found, "store", rotation)
    monkeypatch.setattr(gemm, "whole", None)
    gemm.gemm(a, weight, table, CELL, L, expected, "store", rotation)
    assert all(map(torch.equal, rows(found), rows(expected)))
