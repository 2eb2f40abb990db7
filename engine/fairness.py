"""Who is next: least-served tenant first, then its least-served item. Pure policy; knows no model and no
clock.

The deficit of a round robin is kept as what each has been served: a tenant that is behind goes first until it
has caught up, and one that comes (back) starts level with the least served of those present, so idleness
earns nothing. A lead counts for no more than ``reach`` units, so nobody is shut out for what there was room
for at the time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator


class _Served:
    """Units served to each of some names, on one clock that only rises."""

    def __init__(self, reach: float) -> None:
        self._reach = reach
        self._units: dict[str, float] = {}
        self._order: dict[str, int] = {}
        self._arrivals = 0
        self._floor = 0.0

    def __len__(self) -> int:
        return len(self._units)

    def __contains__(self, name: str) -> bool:
        return name in self._units

    def enter(self, name: str) -> None:
        if self._units:
            self._floor = max(self._floor, min(self._units.values()))
        self._units[name] = self._floor
        self._order[name] = self._arrivals
        self._arrivals += 1

    def leave(self, name: str) -> None:
        units = self._units.pop(name)
        del self._order[name]
        if not self._units:
            self._floor = max(self._floor, units)

    def charge(self, name: str, units: float) -> None:
        self._units[name] += units

    def ranked(self) -> list[tuple[float, int, str]]:
        """(served, arrival, name), the next to serve first."""
        most = min(self._units.values(), default=0.0) + self._reach
        for name, units in self._units.items():
            self._units[name] = min(units, most)
        return sorted((units, self._order[name], name) for name, units in self._units.items())


class FairQueue:
    """Items of tenants and what each has been served."""

    def __init__(self, reach: float) -> None:
        self._reach = reach
        self._tenants = _Served(reach)
        self._items: dict[str, _Served] = {}
        self._tenant_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._tenant_of)

    def __contains__(self, item: str) -> bool:
        return item in self._tenant_of

    def add(self, item: str, tenant: str) -> None:
        if tenant not in self._items:
            self._items[tenant] = _Served(self._reach)
            self._tenants.enter(tenant)
        self._items[tenant].enter(item)
        self._tenant_of[item] = tenant

    def remove(self, item: str) -> None:
        """Forget ``item``; unknown ones are ignored."""
        tenant = self._tenant_of.pop(item, None)
        if tenant is None:
            return
        self._items[tenant].leave(item)
        if not len(self._items[tenant]):
            del self._items[tenant]
            self._tenants.leave(tenant)

    def charge(self, item: str, units: float) -> None:
        """Note that ``item`` was served ``units`` more, at its tenant's expense."""
        tenant = self._tenant_of[item]
        self._items[tenant].charge(item, units)
        self._tenants.charge(tenant, units)

    def order(self, units: float, level: bool = False) -> Iterator[str]:
        """Every item once, in the order in which they'd be served if each took ``units``.

        ``level`` leaves out the items by which a tenant would get further ahead of the least served one."""
        waiting = {
            tenant: iter([name for _, _, name in items.ranked()]) for tenant, items in self._items.items()
        }
        heap = self._tenants.ranked()
        lowest_without_items = math.inf
        while heap:
            served, arrival, tenant = heap[0]
            item = next(waiting[tenant], None)
            if item is None:
                lowest_without_items = min(lowest_without_items, served)
                heapq.heappop(heap)
            elif level and served - lowest_without_items >= units:
                return
            else:
                heapq.heapreplace(heap, (served + units, arrival, tenant))
                yield item
