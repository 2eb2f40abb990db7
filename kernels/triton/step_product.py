"""Dense products of one row a session with one layer's weights.

Beside ``gemm``, which it sums like: all of K in one order, whatever the number of rows. Few rows mean that
weights are what is read, so tiles are narrow, many programs read them together, nothing is looked up before,
and the gates of a token come out of the same launch. Knows no session.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mnemosyne.kernels.triton import step_product_few
from mnemosyne.kernels.triton.step_table import ON_DEVICE, begin
from mnemosyne.kernels.triton.support import PRECISIONS

GROUP = 8
"""Gates whose parts stand side by side (``grouped``)."""
FEW = 16
"""Rows of the smallest tile in fp32. Three passes over 64 rows of which one counts take longer than weights
do to come; the older form of the tensor cores has tiles of 16, which give the same bits."""


class GateProduct(NamedTuple):
    """A second product with the same rows, in fp32."""

    weight: Tensor
    """``grouped``, `[parts G, K]`."""
    bias: Tensor
    """`[G]`, fp32."""
    logits: Tensor
    """fp32 `[rows, G]`, the result."""


def grouped(weight: Tensor) -> Tensor:
    """``weight`` `[layers, parts, G, K]`, whose parts add up, as `[layers, parts G, K]`: the first part of
    GROUP gates, their next part, then other gates. So one tile has all that adds up."""
    layers, parts, gates, K = weight.shape
    groups = weight.view(layers, parts, gates // GROUP, GROUP, K).transpose(1, 2)
    return groups.reshape(layers, parts * gates, K)


@triton.jit
def _call(weight, column, N, K, COLUMNS: tl.constexpr, LINES: tl.constexpr):
    """Rows of ``weight`` `[N, K]`, bf16, from ``column`` on into L2, in lines of 128 bytes."""
    row = tl.minimum(column + tl.arange(0, COLUMNS), N - 1)
    k = tl.minimum(tl.arange(0, LINES) * 64, K - 64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [weight + row[:, None] * K + k[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _chain(x):
    """A sum that ends here: what it is added to isn't what it begins with, as the compiler would have it."""
    if ON_DEVICE:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    a,
    weight,
    ahead,
    out,
    gates,
    bias,
    logits,
    rows,
    N,
    K,
    AHEAD: tl.constexpr,
    GATES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``a`` `[rows, K]`, ``weight`` `[N, K]` and ``gates`` `[PARTS GATES, K]` by descriptors; programs are
    tiles of ROWS x COLUMNS, those that share weights side by side, the gates' behind the others'. KIND as in
    ``gemm``, "add" to ``out``. ``ahead``: ``weight``, whose part is called into L2 (AHEAD lines a row) while
    the launch before still runs."""
    p = tl.program_id(0)
    row = p % TILES * ROWS
    column = p // TILES * COLUMNS
    if AHEAD:
        _call(ahead, column, N, K, COLUMNS, AHEAD)
        if KIND == "swiglu":
            _call(ahead + N * K, column, N, K, COLUMNS, AHEAD)
    begin()
    t = row + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if GATES:  # noqa: SIM102 (known when it is compiled)
        if column >= N:
            for k in range(0, K, DEPTH):
                w = gates.load([column - N, k]).T
                acc += _chain(tl.dot(a.load([row, k]), w, input_precision=PRECISION))
            MADE: tl.constexpr = COLUMNS // PARTS
            parts = tl.reshape(acc, [ROWS, MADE // GROUP, PARTS, GROUP])
            z = tl.reshape(tl.sum(parts, 2), [ROWS, MADE])
            g = (column - N) // PARTS + tl.arange(0, MADE)
            z += tl.load(bias + g)[None, :]
            tl.store(logits + t[:, None] * GATES + g[None, :], z, mask=(t < rows)[:, None])
            return
    second = acc
    for k in range(0, K, DEPTH):
        x = a.load([row, k])
        acc += _chain(tl.dot(x, weight.load([column, k]).T, input_precision=PRECISION))
        if KIND == "swiglu":
            w = weight.load([N + column, k]).T
            second += _chain(tl.dot(x, w, input_precision=PRECISION))
    if KIND == "swiglu":
        acc = acc * second / (1.0 + tl.exp(-second))
    c = column + tl.arange(0, COLUMNS)
    here = (t < rows)[:, None] & (c < N)[None, :]
    at = out + t[:, None] * N + c[None, :]
    if KIND == "add":
        acc += tl.load(at, mask=here, other=0.0)
    tl.store(at, acc, mask=here)


def tiles(rows: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and launch; no bit depends on them. Up to 64 rows: as many bytes of weights on their way as fit,
    in one program or in two on a multiprocessor."""
    if dtype != torch.bfloat16:
        tile = {"COLUMNS": 64, "DEPTH": 32, "num_warps": 4}
        return tile | ({"ROWS": FEW, "num_stages": 5} if rows <= FEW else {"ROWS": 64, "num_stages": 3})
    narrow = columns <= 2048
    if rows <= 64:
        tile = {"ROWS": 64, "COLUMNS": 16 if narrow else 32, "DEPTH": 128}
        return tile | {"num_warps": 4, "num_stages": 8 if narrow else 4}
    tile = {"ROWS": 128, "COLUMNS": 32 if narrow else 64, "DEPTH": 128}
    return tile | {"num_warps": 4, "num_stages": 2}


def product(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    kind: str = "store",
    gates: GateProduct | None = None,
) -> None:
    """``a`` `[rows or more, K]` times ``weight`` `[N, K]` ("swiglu": `[2 N, K]`) into ``out`` `[rows, N]`;
    for "add" ``out`` is fp32 and added to. ``gates``: N is then a multiple of 64."""
    rows, N = out.shape
    K = a.shape[1]
    parts = 0 if gates is None else gates.weight.shape[0] // gates.logits.shape[1]
    if step_product_few.serves(rows, N, K, a.dtype, kind, parts):
        step_product_few.few_product(a, weight, out, kind, gates)
        return
    few = rows <= 64
    options: dict[str, Any] = tiles(rows, N, a.dtype)
    down, block = triton.cdiv(rows, options["ROWS"]), [options["COLUMNS"], options["DEPTH"]]
    described = TensorDescriptor.from_tensor(weight, block)
    more = 0 if gates is None else gates.weight.shape[0]
    made = 0 if gates is None else gates.logits.shape[1]
    grid = (down * (triton.cdiv(N, block[0]) + more // block[0]),)
    product_kernel[grid](
        TensorDescriptor.from_tensor(a, [options["ROWS"], block[1]]),
        described,
        weight,
        out,
        described if gates is None else TensorDescriptor.from_tensor(gates.weight, block),
        out if gates is None else gates.bias,
        out if gates is None else gates.logits,
        rows,
        N,
        K,
        AHEAD=triton.next_power_of_2(K // 64) if few and weight.dtype == torch.bfloat16 else 0,
        GATES=made,
        PARTS=more // made if made else 1,
        GROUP=GROUP,
        TILES=down,
        KIND=kind,
        PRECISION=PRECISIONS[a.dtype],
        launch_pdl=True,
        **options,
    )
