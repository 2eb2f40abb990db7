"""Graphs of waves, each for those that it was captured of, without a GPU. What they hold: ``test_waves``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from mnemosyne.engine.gpu.blob import gpu_layout
from mnemosyne.engine.gpu.open_cache import open_layout
from tests.engine.gpu.opened import tiny
from tests.engine.models import small_model

torch.set_num_threads(1)


def test_a_graph_is_run_for_the_waves_that_it_was_captured_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waves of three cells and of four have two in each of two lanes, and tables of their own."""
    pytest.importorskip("triton", reason="needs triton, which is made for Linux")
    from mnemosyne.engine.gpu.lanes import Group, Lanes
    from mnemosyne.engine.gpu.wave import Tokens
    from mnemosyne.engine.gpu.weights import Weights

    capturing: list[Graph] = []
    ran: list[Group] = []

    class Graph:
        def __init__(self) -> None:
            self.captured: list[Group] = []

        def replay(self) -> None:
            ran.extend(self.captured)

    @contextmanager
    def capture(graph: Graph, **_: object) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.pop()

    def launch(_: Lanes, group: Group, opened: bool) -> None:
        (capturing[-1].captured if capturing else ran).append(group)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Lanes, "_launch", launch)
    config, cpu = tiny("mac", layers=3), torch.device("cpu")
    weights = Weights.of(small_model(config))
    layout, opened = gpu_layout(config, torch.float32), open_layout(config, torch.float32)
    tokens = Tokens.empty(config, 64, cpu)
    most = {config.segment: 4}
    lanes = Lanes(config, weights, layout, opened, tokens, most, graphs=True, lanes=2)
    addresses = np.zeros((1, 3), np.int64)
    waves = [np.ones((count, 5), np.int64) * [0, 1, 1, 1, 1] for count in (3, 4, 3, 4, 2)]
    asked = list(lanes.run(waves, addresses, 64, config.segment))
    assert asked[0] is not asked[1] and asked[0].table.shape == asked[1].table.shape
    assert ran == asked
