"""Steps of ``learn_resident``, most of them of half the hidden units, and how what they take lies in threads
and in shared memory. For programs of 8 warps. Knows no address of a tensor."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mnemosyne.kernels.triton.scan import _settle

D = gl.constexpr(64)
L = gl.constexpr(64)
H = gl.constexpr(256)
HALF = gl.constexpr(128)
"""Hidden units of a wide product: 16 a warp."""
KIND = gl.constexpr(gl.bfloat16)
"""Of operands and momentum."""

UNITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16]))
"""Wide products `[hidden units, *]`."""
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
"""Products `[tokens, *]`: sums over hidden units, scores."""
ROWS = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [8, 1], [1, 0]))
"""What is computed of tokens `[L, D]`, each in one warp."""
FLAT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
"""Momentum `[H, D]` and `[D, H]` on its way, 16 bytes a thread."""
UNIT = gl.constexpr(gl.SliceLayout(1, UNITS.value))
UNIT_COLUMN = gl.constexpr(gl.SliceLayout(0, UNITS.value))
ROW = gl.constexpr(gl.SliceLayout(1, ROWS.value))
COLUMN = gl.constexpr(gl.SliceLayout(0, ROWS.value))
SUM_ROW = gl.constexpr(gl.SliceLayout(1, SUMS.value))
SUM_COLUMN = gl.constexpr(gl.SliceLayout(0, SUMS.value))
OPERAND = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
"""In shared memory, as the tensor cores take it."""
SINGLE = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Its name from Triton 3.7 on, and before."""


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _gelu(z):
    """As ``network.gelu``, ROUGH, in fewer steps."""
    scale: gl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
    cubic: gl.constexpr = 0.7978845608028654 * 0.044715
    return z * (0.5 + 0.5 * _tanh(z * (scale + cubic * (z * z))))


@gluon.jit
def _gelu_slope(z):
    """With its derivative."""
    scale: gl.constexpr = 0.7978845608028654
    cubic: gl.constexpr = 0.7978845608028654 * 0.044715
    square = z * z
    tanh = _tanh(z * (scale + cubic * square))
    gate = 0.5 + 0.5 * tanh
    return z * gate, gate + (z * (0.5 * scale + 1.5 * cubic * square)) * (1.0 - tanh * tanh)


@gluon.jit
def ready():
    """What this program's threads stored in shared memory may be operands from here on."""
    fence_async_shared()
    barrier()


@gluon.jit
def room(COUNT: gl.constexpr):
    """An operand's room [1, COUNT, 64] in shared memory."""
    return gl.allocate_shared_memory(KIND, [1, COUNT, 64], OPERAND)


@gluon.jit
def tile(value, nought):
    """``value`` [64, 64] as an operand in shared memory."""
    operand = room(64).index(nought)
    operand.store(value.to(KIND))
    return operand


@gluon.jit
def half(x, WHICH: gl.constexpr):
    return x.slice(WHICH * HALF, HALF)


@gluon.jit
def _start(m, right):
    """m right of half the hidden units, begun."""
    left = gl.convert_layout(m.to(KIND), gl.DotOperandLayout(0, UNITS, 2), assert_trivial=True)
    return warpgroup_mma(left, right, gl.full([HALF, L], 0.0, gl.float32, UNITS), is_async=True)


@gluon.jit
def _squares(x):
    """Squares, added up as far as one thread has them."""
    return gl.sum(gl.reshape(x * x, [HALF // 16, 2, 8, L]), 1)


@gluon.jit
def by_token(square, nought):
    """The sum over hidden units of what ``_squares`` has left."""
    layout: gl.constexpr = gl.BlockedLayout([2, 1], [4, 8], [1, 8], [0, 1])
    each_warp = gl.allocate_shared_memory(gl.float32, [1, 8, L], PLAIN).index(nought)
    barrier()
    each_warp.store(gl.sum(square, 1))
    barrier()
    return gl.convert_layout(gl.sum(each_warp.load(layout), 0), ROW, assert_trivial=True)


@gluon.jit
def in_rows(z, nought):
    """A sum over hidden units in layout ROWS, by way of shared memory."""
    between = gl.allocate_shared_memory(gl.float32, [1, L, D], SINGLE).index(nought)
    barrier()
    between.store(z)
    barrier()
    return between.load(ROWS)


@gluon.jit
def make_inputs(m1, k, made, slopes):
    """x and its slopes; x's squares."""
    z = warpgroup_mma_wait(0, deps=[_start(m1, k)])
    x, slope = _gelu_slope(z)
    made.store(x.to(KIND))
    slopes.store(slope.to(KIND))
    return _squares(x)


@gluon.jit
def make_gradients(z, slopes):
    """Inner gradients where the slopes were; their squares."""
    back = z * slopes.load(UNITS).to(gl.float32)
    slopes.store(back.to(KIND))
    return _squares(back)


@gluon.jit
def make_reads(m1, s1, back, qa, qf, own, read):
    """y, from the first memory layer."""
    y = _start(m1, qa)
    y = warpgroup_mma(s1, qf, y, is_async=True)
    y = warpgroup_mma(back, own, y, is_async=True)
    y = warpgroup_mma_wait(0, deps=[y])
    read.store(_gelu(y).to(KIND))


@gluon.jit
def move(m, s, left, for_m, for_s, a, f, e):
    """M' = a M + f S + left for_m; S' = e S + left for_s where S lies; the squares of M' - M and of M, summed
    over rows."""
    past = s.load(UNITS).to(gl.float32)
    new = warpgroup_mma(left, for_m, a * m + f * past, is_async=True)
    carried = warpgroup_mma(left, for_s, e * past, is_async=True)
    new, carried = warpgroup_mma_wait(0, deps=[new, carried])
    barrier()  # whatever is put where operands lay, no other warp's product reads them any more
    s.store(_settle(carried).to(KIND))
    new = _settle(new)
    step = new - m
    return new, gl.sum(step * step, 1), gl.sum(m * m, 1)


@gluon.jit
def again(x, MASK: gl.constexpr):
    """Indices ``x``, whose bits in MASK are the thread's, computed anew."""
    own = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x & MASK], dtype=gl.int32, is_pure=True, pack=1
    )
    return own + (x & ~MASK)
