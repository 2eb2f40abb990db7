"""Whether what lies between a training step's products runs as kernels of its own: on a GPU, with gradients.

A small model's step is bound by the bytes that elementwise operations move; ``triton/train_*`` take a chain
of them at once, forward and backward, and nothing else changes. Knows no chain.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fuses(x: Tensor) -> bool:
    """Whether chains of rows like ``x`` `[..., width]` do."""
    if not x.is_cuda or not torch.is_grad_enabled():
        return False
    from mnemosyne.kernels.triton import train_support

    return train_support.rows(x)
