"""The device that is measured: its rates, its clock, and what to call it. Knows no model."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from roofline import Rates

GEMM, TRIAL_GEMM = 8192, 512
COPY_BYTES, TRIAL_COPY_BYTES = 2**31, 2**24
TIMES = 10


class Card:
    """A CUDA device, or the CPU for a trial of the bench itself."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.trial = self.device.type == "cpu"
        self.compute = torch.float32 if self.trial else torch.bfloat16

    def wait(self) -> None:
        """Until everything that was begun has ended."""
        if not self.trial:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def allocated(self) -> int:
        """Bytes of the device's memory that tensors take."""
        return 0 if self.trial else torch.cuda.memory_allocated(self.device)

    def free(self) -> int:
        """Bytes of the device's memory that could be had; those of the machine on a CPU."""
        if self.trial:
            return 2**40
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def clean(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if not self.trial:
            torch.cuda.empty_cache()

    def rates(self) -> Rates:
        """The median of ten: a square product in the compute precision on random numbers, a copy within the
        device's memory, and one from pinned memory (on a CPU, small ones)."""
        size = TRIAL_GEMM if self.trial else GEMM
        nbytes = TRIAL_COPY_BYTES if self.trial else COPY_BYTES
        a, b = (torch.randn(size, size, device=self.device, dtype=self.compute) for _ in range(2))
        gemm = self._median(lambda: torch.mm(a, b))
        source = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copy = self._median(lambda: target.copy_(source))
        pinned = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=not self.trial)
        host = self._median(lambda: target.copy_(pinned, non_blocking=True))
        return Rates(2 * size**3 / gemm, 2 * nbytes / copy, nbytes / host)

    def _median(self, run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        return statistics.median(self.seconds(run) for _ in range(TIMES))

    @property
    def name(self) -> str:
        return platform.processor() or "a CPU" if self.trial else torch.cuda.get_device_name(self.device)

    def facts(self, rates: Rates) -> dict[str, Any]:
        memory = 0 if self.trial else torch.cuda.get_device_properties(self.device).total_memory
        return {
            "card": self.name,
            "memory_bytes": memory,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "compute": str(self.compute).removeprefix("torch."),
            "gemm_flops": rates.gemm,
            "copy_bytes_per_second": rates.copy,
            "host_bytes_per_second": rates.host,
        }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit_of(folder: Path) -> str:
    """What is checked out in ``folder``, and whether it was changed since."""
    try:
        asked = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
