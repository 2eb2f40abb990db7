"""Where states are, and who makes room for whom. Pure policy in bytes: knows no tensor, no handle and no
device.

States that a request under way uses stay on the device; of the others the least recently used leave for host
memory when the device's budget is short. What is copied is in both places until the copy has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Tier(Enum):
    DEVICE = "on the device"
    LEAVING = "on the device, and being copied to the host"
    HOST = "in host memory"
    ARRIVING = "in host memory, and being copied to the device"


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes of states, at most."""

    device: int
    host: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """One state."""

    nbytes: int
    """On the device."""
    host_nbytes: int
    """In host memory, where allocations are rounded up."""
    tier: Tier
    used: int
    """When it was used last, by any clock that rises."""
    busy: bool
    """A request under way needs it where it is."""


def on_device(items: Iterable[Item]) -> int:
    """Bytes that are taken there now."""
    return sum(item.nbytes for item in items if item.tier is not Tier.HOST)


def on_host(items: Iterable[Item]) -> int:
    """Bytes that are taken there now."""
    return sum(item.host_nbytes for item in items if item.tier is not Tier.DEVICE)


def who_leaves(items: Sequence[Item], budgets: Budgets, wanted: int) -> list[int]:
    """Indices of the states that should begin to leave so that ``wanted`` bytes more fit on the device; fewer
    than needed where the others are busy, or the host is full."""
    staying = on_device(item for item in items if item.tier is not Tier.LEAVING)
    short = staying + wanted - budgets.device
    room = budgets.host - on_host(items)
    leaving: list[int] = []
    idle = [i for i, item in enumerate(items) if item.tier is Tier.DEVICE and not item.busy]
    for i in sorted(idle, key=lambda i: items[i].used):
        if short <= 0:
            break
        if items[i].host_nbytes <= room:
            leaving.append(i)
            short -= items[i].nbytes
            room -= items[i].host_nbytes
    return leaving
