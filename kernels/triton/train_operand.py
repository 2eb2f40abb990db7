"""Operands of a training step's products, as the tensor cores are to take them.

In one pass the tensor cores cut an operand to tf32, which makes every product too small; over the chunks of a
scan the error grows to a tenth of a gate's gradient. Rounded to the nearest first, it stays where the
library's products have it. What is rounded where it is loaded is used so throughout. Knows no memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """``x`` `[rows, columns]`, fp32, for a product of this precision: in tf32 the nearest, ties away from
    zero; infinities and NaN stay what they are."""
    if PRECISION == "tf32":
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x
