"""Fuses the small operations of a training step with torch.compile, function by function. Owns the list of functions;
what they compute stays as it is, up to rounding. For training alone: serving promises bits that compiled code moves.

Function by function and not the whole step: the loop over chunks would be unrolled, and compiled anew for every length.
"""

from __future__ import annotations

import torch

from mnemosyne.engine import layers, memory, mixers
from mnemosyne.kernels import chunk

HOT = (
    (chunk, "learn_chunk"),
    (chunk, "read"),
    (memory, "decays"),
    (memory.NeuralMemory, "features"),
    (memory.NeuralMemory, "gates"),
    (memory.NeuralMemory, "emit"),
    (mixers.Gated, "gate"),
    (layers.RMSNorm, "forward"),
    (layers.SwiGLU, "forward"),
)


def fuse() -> None:
    """Replace the hot functions by compiled ones, for the rest of this process."""
    torch._dynamo.config.cache_size_limit = 64
    for owner, name in HOT:
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
