"""Results as figures: the one module that needs matplotlib. Same result, same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mnemosyne.training.experiments.report import Panel, Result

ROW = 3
"""Panels beside one another."""


FEW = 8
"""Places on a logarithmic axis that are named one by one."""


def draw(result: Result, folder: Path) -> Path:
    """``<name>.svg`` with one plot a panel."""
    columns = min(ROW, len(result.panels))
    rows = -(-len(result.panels) // columns)
    style: Any = {"svg.hashsalt": result.name, "svg.fonttype": "none", "font.size": 8, "lines.linewidth": 1.2}
    path = folder / f"{result.name}.svg"
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
        for place, panel in enumerate(result.panels, 1):
            _panel(figure.add_subplot(rows, columns, place), panel)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return path


def _panel(axes: matplotlib.axes.Axes, panel: Panel) -> None:
    for line in panel.lines:
        style = "o-" if line.joined else "o"
        axes.errorbar(
            line.x, line.y, line.half, fmt=style, label=line.label, markersize=2.5, capsize=2, alpha=0.85
        )
    if "x" in panel.logarithmic:
        axes.set_xscale("log")
        places = sorted({x for line in panel.lines for x in line.x})
        if len(places) <= FEW:
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.minorticks_off()
    if "y" in panel.logarithmic:
        axes.set_yscale("log")
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(alpha=0.25)
    if len(panel.lines) > 1:
        axes.legend(fontsize=6)
