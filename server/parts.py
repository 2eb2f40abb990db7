"""The engines and the store that settings ask for. Knows how each is made, not what it is used for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from mnemosyne.checkpoints.directory import DirectoryStore
from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.errors import ConfigError
from mnemosyne.engine.fleet import Fleet
from mnemosyne.engine.interface import EngineLike
from mnemosyne.server.settings import Settings


def make_engine(settings: Settings) -> EngineLike:
    """An engine in a process of its own for each device, several of them as one; they aren't started yet.

    Raises ConfigError where all CUDA devices are asked for and there is none."""
    devices = cuda_devices() if settings.device == "cuda:all" else settings.device.split(",")
    engines = {
        name: EngineClient(_command(settings, device, len(devices)), name=f"the engine on {name}")
        for name, device in zip(names_of(devices), devices, strict=True)
    }
    return Fleet(engines) if len(engines) > 1 else next(iter(engines.values()))


def names_of(devices: Sequence[str]) -> list[str]:
    """What messages and metrics call the devices: as they are, numbered where several engines share one."""
    seen: Counter[str] = Counter()
    names = []
    for device in devices:
        names.append(f"{device}#{seen[device]}" if devices.count(device) > 1 else device)
        seen[device] += 1
    return names


def cuda_devices() -> list[str]:
    import torch  # by nothing else in this process, so by those alone who ask for all devices

    count = torch.cuda.device_count()
    if not count:
        raise ConfigError("device is cuda:all, and no CUDA device was found")
    return [f"cuda:{index}" for index in range(count)]


def _command(settings: Settings, device: str, engines: int) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "mnemosyne.server.engine_main",
        "--checkpoint",
        str(settings.checkpoint),
        "--device",
        device,
        "--dtype",
        settings.dtype,
        "--engines",
        str(engines),
    ]
    for name in ("threads", "max_queued_tokens", "device_state_bytes", "host_state_bytes"):
        if (value := getattr(settings, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def make_store(settings: Settings) -> SessionStore:
    """Redis where one is set, else the data directory. Raises StoreUnavailable."""
    if settings.redis_url is not None:
        from mnemosyne.checkpoints.redis_store import RedisStore

        return RedisStore(settings.redis_url)
    return DirectoryStore(settings.data_dir)
