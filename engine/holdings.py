"""The states that handles stand for, each once, and the tier it is in. Owns the copies under way and what
they cost; the policy is ``tiers``, the copying ``copies``. Knows no handle and no request.

Without budgets there is one tier, nothing moves, and asking costs nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

from mnemosyne.engine.copies import Copier, Copy, Tensors
from mnemosyne.engine.counters import Counters
from mnemosyne.engine.errors import StatesFull
from mnemosyne.engine.tiers import Budgets, Item, Tier, who_leaves

log = logging.getLogger(__name__)
UNBOUNDED = sys.maxsize
SPARE = 8
"""One part in so many of the device's budget is kept free: what a step makes shouldn't wait for a copy."""


@dataclass(eq=False)
class Held:
    """A state's tensors, for whoever refers to them: on the device, or on the host while it is there."""

    tensors: Tensors
    fixed: bool = False
    """It never leaves the device."""
    tier: Tier = Tier.DEVICE
    used: int = 0


class Running(NamedTuple):
    """What a request under way keeps on the device."""

    tensors: Tensors | None
    """Those that it goes on from."""
    reserve: int
    """Bytes of a state that it will make and hasn't yet."""
    making: bool = False
    """Another state is being made beside the steps, and has its place already."""


class Holdings:
    """Not safe for more than one thread."""

    def __init__(self, nbytes: int, counters: Counters, budgets: Budgets | None, copier: Copier) -> None:
        """``nbytes``: what the tensors of any state take."""
        self.budgets = budgets
        self._nbytes, self._host_nbytes = nbytes, copier.host_bytes(nbytes)
        self._counters, self._copier = counters, copier
        self._held: WeakValueDictionary[int, Held] = WeakValueDictionary()
        self._copies: list[tuple[Held, Copy]] = []
        self._abandoned: list[tuple[Copy, Tensors]] = []
        """Copies that nobody wants any more, and what they still read."""
        self._clock = 0

    @property
    def copying(self) -> bool:
        """A copy is under way that somebody may wait for."""
        return bool(self._copies)

    def hold(self, tensors: Tensors, fixed: bool = False) -> Held:
        """The holding of these very tensors, a new one where nobody holds them."""
        held = self._held.get(id(tensors))
        if held is None:
            held = Held(tensors, fixed)
            self._held[id(tensors)] = held
        self.use(held)
        return held

    def use(self, held: Held) -> None:
        self._clock += 1
        held.used = self._clock

    def admit(self, promised: int) -> None:
        """Raise StatesFull where there is no room, in no tier, for one more state beside those held and the
        ``promised`` ones that requests will make."""
        if self.budgets is None:
            return
        taken = self._nbytes * (len(self._held) + promised)
        most = self.budgets.device + self.budgets.host
        if taken + self._nbytes > most:
            raise StatesFull(
                f"the engine holds {len(self._held)} states and will make {promised}, of {self._nbytes} bytes"
                f" each: one more doesn't fit into the {most} bytes of --device-state-bytes and"
                " --host-state-bytes",
                retry_after=2,
            )

    def free(self, running: Sequence[Running]) -> int:
        """States that a step may make now without passing the device's budget; less than 0 where it is
        passed."""
        if self.budgets is None:
            return UNBOUNDED
        return (self.budgets.device - self._on_device(running)) // self._nbytes

    def fits(self, states: int, running: Sequence[Running]) -> bool:
        """Whether ``states`` more fit on the device, beside what those who run will need."""
        if self.budgets is None:
            return True
        reserved = sum(run.reserve for run in running)
        return self._on_device(running) + reserved + states * self._nbytes <= self.budgets.device

    def make_room(self, states: int, running: Sequence[Running], keep: Held | None = None) -> None:
        """Have idle states leave, but ``keep``, so that soon ``states`` more fit on the device, and a little
        besides."""
        if self.budgets is None:
            return
        wanted = states * self._nbytes + self.budgets.device // SPARE
        reserved = sum(run.reserve for run in running)
        if self._on_device(running) + reserved + wanted <= self.budgets.device:
            return
        held = list(self._held.values())
        for i in who_leaves(self._items(running, keep, held), self.budgets, wanted):
            if not self._leave(held[i]):
                return

    def fetch(self, held: Held) -> None:
        """See that it is on the device, or on its way there. Raises torch.OutOfMemoryError."""
        self.use(held)
        if held.tier is Tier.LEAVING:
            self._abandoned += [(copy, held.tensors) for other, copy in self._copies if other is held]
            self._copies = [entry for entry in self._copies if entry[0] is not held]
            held.tier = Tier.DEVICE
        elif held.tier is Tier.HOST:
            self._copies.append((held, self._copier.back(held.tensors)))
            held.tier = Tier.ARRIVING

    def poll(self) -> None:
        """Take note of the copies that have ended."""
        if self._copies or self._abandoned:
            self._abandoned = [entry for entry in self._abandoned if not entry[0].ended()]
            under_way, self._copies = self._copies, []
            for held, copy in under_way:
                if copy.ended():
                    self._end(held, copy)
                else:
                    self._copies.append((held, copy))

    def wait(self) -> None:
        """Return when the oldest copy has ended."""
        if self._copies:
            self._copies[0][1].wait()
        self.poll()

    def clear_device(self, running: Sequence[Running]) -> int:
        """Have every idle state leave that the host has room for, and return when they are gone: how many
        left."""
        if self.budgets is None:
            return 0
        self.make_room(self.budgets.device // self._nbytes, running)
        leaving = [held for held, _ in self._copies if held.tier is Tier.LEAVING]
        while any(held.tier is Tier.LEAVING for held in leaving):
            self.wait()
        return len(leaving)

    def gauges(self) -> dict[str, float]:
        tiers = [held.tier for held in self._held.values()]
        away = sum(tier in (Tier.HOST, Tier.ARRIVING) for tier in tiers)
        return {
            "device_states": len(tiers) - away,
            "device_state_bytes": self._nbytes * sum(tier is not Tier.HOST for tier in tiers),
            "host_states": away,
            "host_state_bytes": self._host_nbytes * sum(tier is not Tier.DEVICE for tier in tiers),
        }

    def _on_device(self, running: Sequence[Running]) -> int:
        """Bytes that are taken there now, by holdings and by those who run; asked in every step."""
        there = {key for key, held in self._held.items() if held.tier is not Tier.HOST}
        used = {id(run.tensors) for run in running if run.tensors is not None}
        return self._nbytes * (len(there | used) + sum(run.making for run in running))

    def _items(self, running: Sequence[Running], keep: Held | None, held: Sequence[Held]) -> list[Item]:
        """``held`` in order, then what no handle stands for."""
        busy = {id(run.tensors) for run in running if run.tensors is not None}
        items = [
            Item(
                nbytes=self._nbytes,
                host_nbytes=self._host_nbytes,
                tier=one.tier,
                used=one.used,
                busy=one.fixed or one is keep or id(one.tensors) in busy,
            )
            for one in held
        ]
        others = self._nbytes * sum(key not in self._held for key in busy)
        others += self._nbytes * sum(run.making for run in running)
        others += sum(run.reserve for run in running)
        items.append(Item(nbytes=others, host_nbytes=0, tier=Tier.DEVICE, used=self._clock, busy=True))
        return items

    def _leave(self, held: Held) -> bool:
        try:
            copy = self._copier.out(held.tensors)
        except RuntimeError as error:  # what torch raises where there is no more memory to pin
            assert self.budgets is not None
            taken = self._host_nbytes * sum(held.tier is not Tier.DEVICE for held in self._held.values())
            log.error(
                "no host memory for more than %d bytes of states, set --host-state-bytes lower: %s",
                taken,
                error,
            )
            self.budgets = Budgets(device=self.budgets.device, host=taken)
            return False
        self._copies.append((held, copy))
        held.tier = Tier.LEAVING
        return True

    def _end(self, held: Held, copy: Copy) -> None:
        way = "out" if held.tier is Tier.LEAVING else "in"
        held.tier = Tier.HOST if held.tier is Tier.LEAVING else Tier.DEVICE
        del self._held[id(held.tensors)]
        held.tensors = copy.tensors
        self._held[id(held.tensors)] = held
        self._counters.add(f"states_moved_{way}_total")
        self._counters.add(f"state_bytes_moved_{way}_total", self._nbytes)
        self._counters.add(f"state_move_{way}_seconds_total", copy.seconds)


def tensor_bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
