"""Waves on a device: their room, their tables, and the graphs that they are captured as.

A wave's cells are dealt to lanes, which run side by side: while the memories of one lane go through their
chunks one after the other, which leaves the tensor cores idle, another lane's products run. Nothing passes
between cells, so lanes change no bit. Knows no session but as addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.blob import BlobLayout
from mnemosyne.engine.gpu.schedule import Cells, cell_rows
from mnemosyne.engine.gpu.wave import Tokens, Wave
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.kernels.triton.cells import FIELDS

LANES = 3
"""Of waves of whole cells; those of single chunks have one."""
SHORT = (1, 4, 16)
"""Sizes of waves of single chunks, besides the largest: a program costs a little even where its cell is
empty, and a session that commits a chunk while others decode comes alone."""

AHEAD = 32
"""Most waves whose tables go to the device together; those of the next are made while they run. The first
goes alone, then two, then twice as many each time, so that the device has something to do."""


class Group:
    """The lanes of one size of wave."""

    def __init__(self, lanes: Sequence[Wave], table: Tensor) -> None:
        self.lanes, self.table = lanes, table
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        """Of what runs in it, by whether open chunks are filled."""


class Lanes:
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layout: BlobLayout,
        opened: BlobLayout,
        tokens: Tokens,
        cells: Mapping[int, int],
        *,
        graphs: bool,
        lanes: int,
    ) -> None:
        """``cells``: the most of a wave, by their rows, which are a whole cell's or a chunk's. ``opened`` is
        the layout of an open chunk."""
        self._tokens, self._opened = tokens, opened
        self._device = tokens.residual.device
        self._captures = graphs
        rows, chunk = cell_rows(config), config.chunk
        self.most = cells
        # One stream's diagonal has as many cells as layers; more sessions fill the largest.
        counts = {rows: (config.layers,), chunk: SHORT}
        sizes = {
            (min(count, most), size, lanes if size == rows else 1)
            for size, most in self.most.items()
            for count in (*counts[size], most)
        }

        def wave(count: int, size: int, room: Tensor, table: Tensor) -> Wave:
            return Wave(config, weights, layout, count, size, room, table)

        meta = torch.empty(0, dtype=torch.uint8, device="meta")
        needed = {(count, size, n): wave(-(-count // n), size, meta, meta).needed for count, size, n in sizes}
        most = max(n * one for (_, _, n), one in needed.items())
        room = torch.empty(most, dtype=torch.uint8, device=self._device)
        self._groups: dict[tuple[int, int], Group] = {}
        for (count, size, n), one in needed.items():
            each = -(-count // n)
            table = torch.zeros(n, len(FIELDS), each, dtype=torch.int64, device=self._device)
            made = [wave(each, size, room[i * one : (i + 1) * one], table[i]) for i in range(n)]
            self._groups[count, size] = Group(made, table)
        on_gpu = self._device.type == "cuda"
        self._streams = [torch.cuda.Stream(self._device) for _ in range(lanes - 1)] if on_gpu else []

    def run(
        self,
        waves: Iterable[Cells],
        addresses: NDArray[np.int64],
        length: int,
        size: int,
        opened: bool = False,
    ) -> Iterator[Group]:
        """Run ``waves`` one after the other, each when it is asked for; cells have room for ``size`` rows.

        ``addresses`` `[B, 3]`: of each session's state, of its open chunk, and how many of its ``length``
        tokens count. ``opened``: the open chunks are filled, and the states stay (``Wave.run``)."""
        rest, ahead = iter(waves), 1
        while some := list(islice(rest, ahead)):
            groups = [self._group(len(cells), size) for cells in some]
            tables = [
                _table(group, cells, addresses, length) for group, cells in zip(groups, some, strict=True)
            ]
            there = torch.from_numpy(np.concatenate([table.ravel() for table in tables]))
            if self._device.type == "cuda":
                there = there.pin_memory().to(self._device, non_blocking=True)
            for group, table in zip(groups, there.split([table.size for table in tables]), strict=True):
                group.table.copy_(table.view(group.table.shape))
                self._run(group, opened)
                yield group
            ahead = min(2 * ahead, AHEAD)

    def _group(self, cells: int, size: int) -> Group:
        """The smallest that takes them."""
        return self._groups[min(key for key in self._groups if key[0] >= cells and key[1] == size)]

    def _run(self, group: Group, opened: bool) -> None:
        if not self._captures:
            self._launch(group, opened)
            return
        if opened in group.graphs:
            group.graphs[opened].replay()
            return
        # The first time compiles, which can't be captured; it is this wave's run, too.
        self._launch(group, opened)
        graph = torch.cuda.CUDAGraph()
        # What another thread asks of a device meanwhile must not end the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._launch(group, opened)
        group.graphs[opened] = graph

    def _launch(self, group: Group, opened: bool) -> None:
        layout = self._opened if opened else None
        first, *others = group.lanes
        if not self._streams:
            for lane in group.lanes:
                lane.run(self._tokens, layout)
            return
        main = torch.cuda.current_stream(self._device)
        for lane, stream in zip(others, self._streams, strict=False):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                lane.run(self._tokens, layout)
        first.run(self._tokens, layout)
        for _, stream in zip(others, self._streams, strict=False):
            main.wait_stream(stream)


def _table(group: Group, cells: Cells, addresses: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """A wave's table `[lanes, fields, cells of a lane]` (``kernels.triton.cells``), cells dealt in turn."""
    session, layer, first, chunks, place = cells.T
    state, opened, counted = addresses[session].T
    lanes, fields, each = group.table.shape
    table = np.zeros((each, lanes, fields), np.int64)
    columns = (layer, chunks, session * length + first, state, place, opened, counted - first)
    table.reshape(-1, fields)[: len(cells)] = np.stack(columns, 1)
    return np.ascontiguousarray(table.transpose(1, 2, 0))
