"""What every experiment draws: panels, and curves with all their seeds.

Figures are made without `pyplot`, so that no state is shared and no display is needed.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments._types import Arrays

__all__ = ["COLOURS", "arms_of", "curves", "panels"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")


def panels(titles: list[str], size: float = 3.4, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with one row of square panels under the given titles."""
    figure = Figure(figsize=(size * len(titles), size), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(titles), squeeze=False, **options)[0]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=10)
    return figure, list(axes)


def arms_of(arrays: Arrays) -> dict[str, Arrays]:
    """The curves `[seeds, steps]` of each arm by measure, from `curves/<arm>/<measure>`."""
    arms: dict[str, Arrays] = {}
    for name, values in arrays.items():
        if name.startswith("curves/"):
            _, arm, measure = name.split("/")
            arms.setdefault(arm, {})[measure] = values
    return arms


def curves(arrays: Arrays, unit: str) -> Figure:
    """Every curve against its steps of that unit: the median thick, each seed thin."""
    arms = arms_of(arrays)
    measures = list(next(iter(arms.values())))
    figure, axes = panels([measure.replace("_", " ") for measure in measures])
    for panel, measure in zip(axes, measures, strict=True):
        for (arm, values), colour in zip(arms.items(), COLOURS, strict=False):
            steps = np.arange(1, values[measure].shape[1] + 1)
            panel.plot(steps, values[measure].T, color=colour, linewidth=0.5, alpha=0.3)
            panel.plot(steps, np.median(values[measure], axis=0), color=colour, label=arm)
        panel.set_xlabel(unit)
        if measure.endswith("loss"):
            panel.set_yscale("log", nonpositive="mask")
    axes[0].legend(fontsize=7)
    return figure
