"""Who leaves the device for the host: every small case, and that it takes no torch to decide."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mnemosyne.engine.tiers import Budgets, Item, Tier, on_device, on_host, who_leaves


def every_case(items: int) -> Iterator[tuple[list[Item], Budgets, int]]:
    kinds = list(itertools.product(Tier, (False, True)))
    for chosen in itertools.product(kinds, repeat=items):
        for order in itertools.permutations(range(items)):
            held = [
                Item(nbytes=2, host_nbytes=3, tier=tier, used=used, busy=busy)
                for (tier, busy), used in zip(chosen, order, strict=True)
            ]
            for device, host, wanted in itertools.product(range(0, 7, 2), range(0, 10, 3), (0, 1, 4)):
                yield held, Budgets(device=device, host=host), wanted


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_small_case(count: int) -> None:
    for items, budgets, wanted in every_case(count):
        left = who_leaves(items, budgets, wanted)
        case = (items, budgets, wanted, left)
        assert len(set(left)) == len(left), case
        assert all(items[i].tier is Tier.DEVICE and not items[i].busy for i in left), case
        on_host_then = on_host(items) + sum(items[i].host_nbytes for i in left)
        assert not left or on_host_then <= budgets.host, case
        idle = [i for i, item in enumerate(items) if item.tier is Tier.DEVICE and not item.busy]
        assert left == sorted(idle, key=lambda i: items[i].used)[: len(left)], f"not the oldest: {case}"

        staying = sum(item.nbytes for item in items if item.tier in (Tier.DEVICE, Tier.ARRIVING))
        short = staying + wanted - budgets.device
        freed = sum(items[i].nbytes for i in left)
        assert not left or freed - items[left[-1]].nbytes < short, f"more than needed: {case}"
        if freed < short:
            assert len(left) == len(idle) or on_host_then + 3 > budgets.host, f"too few: {case}"


def test_what_is_copied_is_in_both_places() -> None:
    items = [Item(nbytes=2, host_nbytes=3, tier=tier, used=0, busy=False) for tier in Tier]
    assert (on_device(items), on_host(items)) == (6, 9)


def test_a_large_state_that_the_host_cannot_take_lets_a_small_one_go() -> None:
    large = Item(nbytes=8, host_nbytes=8, tier=Tier.DEVICE, used=1, busy=False)
    small = Item(nbytes=2, host_nbytes=2, tier=Tier.DEVICE, used=2, busy=False)
    assert who_leaves([large, small], Budgets(device=9, host=4), wanted=0) == [1]


def test_the_policy_needs_no_torch() -> None:
    code = "import sys, mnemosyne.engine.tiers; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
