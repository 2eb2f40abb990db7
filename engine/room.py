"""How much memory there is for states: on the device, and pinned on the host. Owns the defaults; knows no
state and no model."""

from __future__ import annotations

from pathlib import Path

import torch

from mnemosyne.engine.errors import ConfigError
from mnemosyne.engine.tiers import Budgets

STATES_SHARE = 0.75
"""Of the device's memory that the model leaves, what states may take; the rest is a step's working room."""
HOST_SHARE = 0.5
"""Of the machine's free memory, what states may take: pinned memory is lost to everybody else."""
LEAST_ON_DEVICE = 3
"""States: that of a session that has read nothing, one to go on from, and the new one."""
LEAST = 8
"""States in both: a quarter of them is for what running requests make (``EngineInfo.room_bytes``)."""
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def budgets(
    device: torch.device,
    nbytes: int,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    engines: int = 1,
) -> Budgets | None:
    """Those of an engine whose states take ``nbytes`` and whose model is loaded, one of ``engines`` on this
    machine; None for a device whose memory is the host's. What isn't given follows from what is free.

    Raises ConfigError for what can't be."""
    if device.type != "cuda":
        if device_bytes is not None or host_bytes is not None:
            raise ConfigError(
                f"device_state_bytes and host_state_bytes are for a CUDA device: on {device.type} states have"
                " one place"
            )
        return None
    if device_bytes is None:
        device_bytes = int(STATES_SHARE * free_on(device))
    if host_bytes is None:
        host_bytes = int(HOST_SHARE * free_on_host()) // engines
    if device_bytes < LEAST_ON_DEVICE * nbytes or device_bytes + host_bytes < LEAST * nbytes:
        raise ConfigError(
            f"states of this model take {nbytes} bytes each: {device_bytes} (device_state_bytes) must hold"
            f" {LEAST_ON_DEVICE} of them, and together with {host_bytes} (host_state_bytes) {LEAST}"
        )
    return Budgets(device=device_bytes, host=host_bytes)


def free_on(device: torch.device) -> int:
    """Bytes that this process may still take."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def free_on_host(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take, by what the machine has and what a container is allowed; none
    where the system doesn't say."""
    try:
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0
    try:
        allowed = int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no limit is the word "max"
        return free
    return max(0, min(free, allowed))
