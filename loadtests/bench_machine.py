"""What this machine can do at best: the rate of its matrix products. Knows no model."""

from __future__ import annotations

import time

import torch

THREADS = 2
SIZE = 1024
SECONDS = 1.0
LEAST = 5
BF16_GAIN = 1.5
"""With instructions for it bf16 is several times as fast as fp32, without them it is slower."""


class Machine:
    """Best rates seen so far, in FLOP/s. ``measure`` again to give a disturbed moment another chance."""

    def __init__(self) -> None:
        self.rates = {torch.float32: 0.0, torch.bfloat16: 0.0}

    def measure(self) -> None:
        """Products of 1024 x 1024 in turns of fp32 and bf16, the best of those of about a second each."""
        torch.set_num_threads(THREADS)
        for dtype in self.rates:
            a, b = torch.randn(2, SIZE, SIZE).to(dtype)
            torch.mm(a, b)
            count, spent = 0, 0.0
            while count < LEAST or spent < SECONDS:
                began = time.perf_counter()
                torch.mm(a, b)
                seconds = time.perf_counter() - began
                self.rates[dtype] = max(self.rates[dtype], 2 * SIZE**3 / seconds)
                count, spent = count + 1, spent + seconds

    @property
    def fp32(self) -> float:
        return self.rates[torch.float32]

    @property
    def bf16(self) -> float:
        return self.rates[torch.bfloat16]

    @property
    def has_bf16(self) -> bool:
        return self.bf16 > BF16_GAIN * self.fp32

    def facts(self) -> dict[str, object]:
        return {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "threads": THREADS,
            "fp32_gflops": round(self.fp32 / 1e9, 1),
            "bf16_gflops": round(self.bf16 / 1e9, 1),
        }
