"""Steps of ``learn_resident``, most of them of half the hidden units, and how what they take lies in threads
and in shared memory. For programs of 8 warps. Knows no address of a tensor."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
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
def gelu(z):
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
def half(x, WHICH: gl.constexpr):
    return x.slice(WHICH * HALF, HALF)


@gluon.jit
def tile_of(x, nought, WHICH: gl.constexpr):
    """One of two operands [64, 64] in a room of HALF."""
    return x.index(nought).slice(WHICH * 64, 64)


@gluon.jit
def start(m, right):
    """m right of half the hidden units, begun."""
    low, high = m & 0xFFFF, (m >> 16) & 0xFFFF
    left = _beside(low.to(gl.int16), high.to(gl.int16)).to(KIND, bitcast=True)
    left = gl.convert_layout(left, gl.DotOperandLayout(0, UNITS, 2), assert_trivial=True)
    return warpgroup_mma(left, right, gl.full([HALF, L], 0.0, gl.float32, UNITS), is_async=True)


@gluon.jit
def _squares(x):
    """Squares, added up as far as one thread has them."""
    return gl.sum(gl.reshape(x * x, [HALF // 16, 2, 8, L]), 1)


@gluon.jit
def over_warps(warps):
    """The sum over hidden units of what the warps have left."""
    layout: gl.constexpr = gl.BlockedLayout([2, 1], [4, 8], [1, 8], [0, 1])
    return gl.convert_layout(gl.sum(warps.load(layout), 0), ROW, assert_trivial=True)


@gluon.jit
def make_inputs(z, made, slopes):
    """x and its slopes; x's squares."""
    x, slope = _gelu_slope(z)
    made.store(x.to(KIND))
    slopes.store(slope.to(KIND))
    return _squares(x)


@gluon.jit
def make_gradients(z, slopes, where):
    """Inner gradients where the slopes were; their squares."""
    back = z * slopes.to(gl.float32)
    where.store(back.to(KIND))
    return _squares(back)


@gluon.jit
def reads_of(m1, s1, back, qa, qf, own):
    """y before its activation, begun: three products."""
    y = start(m1, qa)
    y = warpgroup_mma(s1, qf, y, is_async=True)
    return warpgroup_mma(back, own, y, is_async=True)


@gluon.jit
def sum_of(left_a, left_b, right, z):
    """A sum over hidden units, begun: two products."""
    z = warpgroup_mma(left_a, half(right, 0), z, is_async=True)
    return warpgroup_mma(left_b, half(right, 1), z, is_async=True)


@gluon.jit
def _in_thread(x):
    """Added up as far as one thread has them: [warps, 8, 4]."""
    x = gl.reshape(x, [HALF // 16, 2, 8, 8, 4, 2])
    return gl.sum(gl.sum(gl.sum(x, 5), 3), 1)


@gluon.jit
def moved(m, product, past, a, f, told, HALF_OF: gl.constexpr, WHICH: gl.constexpr):
    """M' = a M + f S + product; tells the squares of M' - M and of M."""
    new = _settle(product + f * past + a * m)
    step = new - m
    tell(told, HALF_OF, WHICH, gl.sum(gl.sum(_in_thread(step * step), 2), 1))
    tell(told, HALF_OF, WHICH + 1, gl.sum(gl.sum(_in_thread(m * m), 2), 1))
    return new


@gluon.jit
def parted(m, upper):
    """An fp32 matrix in two: its upper bits, which round it to an operand (halves up), go to ``upper``; the
    lower ones come back, two in a register."""
    bits = m.to(gl.int32, bitcast=True) + 0x8000
    upper.store((bits >> 16).to(gl.int16).to(KIND, bitcast=True))
    even, odd = gl.split(gl.reshape(bits, [HALF, D // 2, 2]))
    return (even & 0xFFFF) | (odd << 16)


@gluon.jit
def joined(upper, lower):
    """What was parted."""
    bits = gl.join(lower & 0xFFFF, (lower >> 16) & 0xFFFF)
    bits = gl.convert_layout(gl.reshape(bits, [HALF, D]), UNITS, assert_trivial=True)
    bits |= upper.load(UNITS).to(gl.int16, bitcast=True).to(gl.int32) << 16
    return (bits - 0x8000).to(gl.float32, bitcast=True)


@gluon.jit
def _beside(even, odd):
    x = gl.reshape(gl.join(even, odd), [HALF, D])
    return gl.convert_layout(x, UNITS, assert_trivial=True)


@gluon.jit
def parts(m):
    """An fp32 matrix in two, each two in a register: the upper bits, which round it to an operand (halves
    up), and the lower ones."""
    even, odd = gl.split(gl.reshape(m.to(gl.int32, bitcast=True) + 0x8000, [HALF, D // 2, 2]))
    upper = ((even >> 16) & 0xFFFF) | (odd & -0x10000)
    return upper, (even & 0xFFFF) | (odd << 16)


@gluon.jit
def rejoined(upper, lower):
    """What was in parts."""
    even = (lower & 0xFFFF) | (upper << 16)
    odd = ((lower >> 16) & 0xFFFF) | (upper & -0x10000)
    return (_beside(even, odd) - 0x8000).to(gl.float32, bitcast=True)


@gluon.jit
def by_warp_of_tokens(x):
    return gl.sum(gl.reshape(x, [8, 8]), 1)


@gluon.jit
def tell(told, HALF_OF: gl.constexpr, WHICH: gl.constexpr, x):
    """One number a warp, of half the hidden units."""
    told.slice(HALF_OF * 8, 8).slice(WHICH, 1, dim=1).store(gl.expand_dims(x, 1))


@gluon.jit
def tell_all(told, trace):
    """The sums of what was told: four of units in two halves, two of tokens."""
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, 8], [0, 1])
    which = gl.arange(0, 32, gl.SliceLayout(0, layout))
    both = gl.sum(told.slice(0, 8).load(layout), 0)
    both += gl.where(which < 4, gl.sum(told.slice(8, 8).load(layout), 0), 0.0)
    gl.store(trace + gl.where(which < 4, which + 3, which - 4), both, mask=which < 6)


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def sigmoid(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp(-x)], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _fetch(pointer):
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def fetch_beside(
    gates,
    vectors,
    decay,
    cell,
    c,
    head,
    gates_width,
    gates_column,
    CELL: gl.constexpr,
    HEADS: gl.constexpr,
    VECTORS: gl.constexpr,
):
    """A chunk's decays, vectors and gates into the second cache, a line a thread."""
    i = gl.arange(0, 256, gl.BlockedLayout([1], [32], [8], [0]))
    place = (cell * (CELL // L) + c) * HEADS + head
    line = (decay + place * 2 * L * L).to(gl.int64) + (i & 127) * 128
    row = (cell * CELL + c * L + (i & 63)) * gates_width + gates_column + head * D
    line = gl.where(i < 128, line, (gates + row).to(gl.int64))
    beside = (vectors + place * 2 * VECTORS * L).to(gl.int64) + (i & 63) * 128
    line = gl.where(
        i < 192, line, gl.minimum(beside, (vectors + (place + 1) * 2 * VECTORS * L).to(gl.int64) - 128)
    )
    _fetch(line)
