"""In which precision this machine computes, and what else the bits depend on. Knows no session and no
file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from typing import Literal

import torch

from mnemosyne.engine.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]
REVISIONS = {"reference": "2", "triton": "triton 6"}
"""Of what computes: another one whenever a change of it may change a bit."""
_SIZE = 512
"""Rows, columns and depth of the product that is measured: large enough that one look tells."""
_GAIN = 1.5
"""How much faster bf16 must be: where the CPU has no instructions for it it is slower, where it has it wins
by far."""


def choose(device: torch.device, precision: Precision = "auto") -> torch.dtype:
    """The type of the dense products; ``auto`` measures one of them for some milliseconds on a CPU."""
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if device.type != "cpu":
        return torch.bfloat16
    slow, fast = (_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    return torch.bfloat16 if slow > _GAIN * fast else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    """The best of several, so that what else the machine does at the moment doesn't decide."""
    x = torch.ones(_SIZE, _SIZE, dtype=dtype)
    weight = torch.ones(_SIZE, _SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return best


def pick_device(name: str) -> torch.device:
    """The device, made this process's current one: kernels are launched there, whatever their tensors say.

    Raises ConfigError where there is no such device."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device was found; choose another with --device cpu")
    if device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise ConfigError(f"there is no device {name}: {count} CUDA devices were found")
        torch.cuda.set_device(device)
    return device


def describe(
    device: torch.device, compute: torch.dtype, computes: Literal["reference", "triton"] = "reference"
) -> dict[str, str]:
    """Everything that two engines must have in common for their states to be equal to the bit; ``computes``:
    what serves the model there."""
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {
        "device": device.type,
        "kind": kind,
        "compute": str(compute).removeprefix("torch."),
        "kernels": REVISIONS[computes] + (_compiler() if computes == "triton" else ""),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def _compiler() -> str:
    """What makes code of the kernels, and decides which of them there are (``learn_resident``)."""
    try:
        return f", compiled by {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def fingerprint(numerics: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(numerics, sort_keys=True).encode()).hexdigest()
