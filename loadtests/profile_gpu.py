"""Where the time of the GPU engine goes: the kernels of reading and of a decoding step, by their share.

    python3 loadtests/profile_gpu.py --preset 760M --variant mac

Random weights. Reading runs in one lane and without graphs, so that kernels don't overlap and each is counted
by itself; a step's are as they are launched. For whoever works on the kernels: `make bench-gpu` measures
speeds and checks results, this doesn't. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mnemosyne.engine.config import PRESETS, preset
from mnemosyne.engine.gpu.model import GpuTitans
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import INPUT

TOKENS = 65_536
"""Read by one stream."""
WARM = 3


def kernels(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Of one call of ``run``, after some: name, launches, microseconds of each; the dearest first."""
    for _ in range(WARM):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    found = [event for event in profiled.key_averages() if event.self_device_time_total > 0]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": e.key, "launches": e.count, "microseconds": e.self_device_time_total / e.count}
        for e in found
    ]


def show(what: str, found: list[dict[str, Any]]) -> None:
    total = sum(each["launches"] * each["microseconds"] for each in found)
    print(f"{what}: {total / 1000:.2f} ms of kernels")
    for each in found[:14]:
        share = each["launches"] * each["microseconds"] / total
        print(f"  {share:6.1%} {each['launches']:6d} x {each['microseconds']:9.1f} us  {each['kernel'][:60]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="760M")
    parser.add_argument("--variant", choices=("mac", "mag", "mal", "lmm"), default="mac")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found")
    config = preset(options.preset, options.variant)
    with torch.device("cuda"):
        titans = Titans(config).prepare(torch.bfloat16)
    model = GpuTitans(titans, graphs=False, tokens=TOKENS, lanes=1)
    tokens = torch.randint(config.vocab_size, (1, TOKENS), device="cuda")
    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "parameters": titans.parameter_count()}
    result["read"] = kernels(lambda: model.prefill([model.initial_state()], tokens))
    show(f"reading {TOKENS:,} tokens", result["read"])

    (state,), _ = model.prefill([model.initial_state()], tokens[:, : config.segment + config.segment // 2])
    for batch in options.batches:
        copies = [
            dataclasses.replace(state, tensors={name: t.clone() for name, t in state.tensors.items()})
            for _ in range(batch)
        ]
        pending = [dataclasses.replace(copy, pending=(1,), kinds=bytes([INPUT])) for copy in copies]
        _, chunks = model.open_chunk(pending)
        ids = torch.ones(batch, dtype=torch.int64)
        result[f"step {batch}"] = kernels(lambda: model.decode(chunks, ids))  # noqa: B023 (called at once)
        show(f"a step of {batch} sessions", result[f"step {batch}"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
