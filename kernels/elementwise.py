"""Elementwise functions whose bits don't depend on how many elements come together. Knows no shape's meaning.

On a CPU the library computes most of a tensor with vector instructions and the rest of each thread's share
one by one, by other formulas; which elements are the rest depends on the count, the strides and the threads.
Here every thread's share is a whole number of vectors. On a GPU, and while training, the functions are the
library's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

VECTORS = 64
"""Elements: a multiple of two vectors of every precision and instruction set."""
GRAIN = 32_768
"""Elements that a thread takes at the least (ATen's GRAIN_SIZE)."""
ALL_THREADS = 16_384
"""Elements above which GELU is divided among all threads."""


def _padded(count: int) -> int:
    """The least size from ``count`` on that divides into whole vectors for each thread that takes part."""
    threads, size = torch.get_num_threads(), -1
    while size != count:
        size = count
        shares = math.lcm(threads, min(threads, -(-size // GRAIN))) if size > ALL_THREADS else 1
        count = -(-size // (VECTORS * shares)) * VECTORS * shares
    return size


def steady(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """``function`` of tensors of one shape, element by element."""
    first = arguments[0]
    if first.device.type != "cpu" or torch.is_grad_enabled() or not first.numel():
        return function(*arguments)
    count = first.numel()
    missing = _padded(count) - count
    flat = [x.contiguous().view(-1) for x in arguments]
    if missing:
        flat = [F.pad(x, (0, missing), value=1.0) for x in flat]
    return function(*flat)[:count].view(first.shape)


def sigmoid(x: Tensor) -> Tensor:
    return steady(torch.sigmoid, x)


def silu(x: Tensor) -> Tensor:
    return steady(F.silu, x)


def exp(x: Tensor) -> Tensor:
    return steady(torch.exp, x)


def log(x: Tensor) -> Tensor:
    return steady(torch.log, x)


def tanh(x: Tensor) -> Tensor:
    return steady(torch.tanh, x)


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent of x >= 0."""
    return steady(partial(torch.pow, exponent=exponent), x)


def softplus(x: Tensor) -> Tensor:
    return steady(F.softplus, x)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
    return out


def gelu(x: Tensor) -> Tensor:
    return steady(_gelu, x)


def gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient * gelu'(x)."""
    return steady(_gelu_backward, gradient, x)
