"""The one place that draws: panels with named axes, scales, legends and a caption.

Figures are made without `pyplot`, so that no state is shared and no display is needed. Arms
differ in colour, dashes and marker, so that a reader who cannot see the colours, or who prints
in grey, can still tell them apart.
"""

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from experiments._run import Arrays, NDArray, arms_of

__all__ = [
    "COLOURS",
    "MARKERS",
    "SEEDS",
    "bars",
    "confusion",
    "curves",
    "errorbars",
    "finish",
    "heatmap",
    "histogram",
    "legend",
    "lines",
    "panels",
    "style",
    "under",
]

# The last look is that of training curves, which stand beside those of every arm.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#666666",
    "#000000",
)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)), (0, (3, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")
TRAINING = 7  # The number of that look.
SEEDS = " Thick: median of the seeds; thin: each seed."  # For captions of `lines`.
FEW = 25  # A curve of so few points, or fewer, shows each of them by a marker.

Scale = Literal["linear", "log", "log2"]


def under(arrays: Arrays, folder: str) -> Arrays:
    """The arrays whose names begin with that of the folder and a slash, by what follows."""
    start = f"{folder}/"
    return {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}


def panels(
    titles: Sequence[str], caption: str, *, size: float = 3.5, columns: int = 2, **options: Any
) -> tuple[Figure, list[Any]]:
    """A figure of square panels under the given titles, with a caption above all of them.

    Two panels of the default size are as wide as the report, and can still be read on a phone.
    """
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    width = max(size * columns, 4.0)
    figure = Figure(figsize=(width, size * rows + 0.6), layout="constrained", dpi=110)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for panel, title in zip(axes, titles, strict=False):
        panel.set_title(title, fontsize=10)
    for panel in axes[len(titles) :]:
        panel.set_axis_off()
    wrapped = textwrap.fill(caption, int(14 * width))
    figure.suptitle(wrapped, fontsize=9, x=0.01, horizontalalignment="left")
    return figure, axes[: len(titles)]


def finish(
    panel: Any,
    x: str,
    y: str,
    *,
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    whole: bool = False,
) -> None:
    """Names both axes with their units, and sets scales whose ticks are plain numbers.

    Args:
        panel: the axes to finish, after everything is drawn on them.
        x: name and unit of the horizontal axis.
        y: name and unit of the vertical axis.
        x_scale: "linear", or "log" or "log2" with ticks at powers of 10 or 2.
        y_scale: the same for the vertical axis.
        whole: whether the horizontal axis counts something, so that its ticks are integers.
    """
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    if whole and x_scale == "linear":
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axis, scale in ((panel.xaxis, x_scale), (panel.yaxis, y_scale)):
        if scale != "linear":
            _logarithmic(panel, axis, scale)
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.set_axisbelow(True)


def _logarithmic(panel: Any, axis: Any, scale: Scale) -> None:
    base = 2 if scale == "log2" else 10
    set_scale = panel.set_xscale if axis is panel.xaxis else panel.set_yscale
    values = np.ones(0)
    for line in panel.lines:
        data = line.get_xdata() if axis is panel.xaxis else line.get_ydata()
        values = np.append(values, np.asarray(data, float))
    positive = values[values > 0]
    if axis is panel.yaxis and positive.size and (values == 0).any():
        # An exact zero has no logarithm. Below the smallest value the axis is linear, so that
        # zero has a place, and a tick, of its own.
        lowest = base ** np.floor(np.log(positive.min()) / np.log(base))
        set_scale("symlog", base=base, linthresh=lowest, linscale=0.4)
        panel.set_ylim(bottom=-lowest / 4)
        axis.set_minor_locator(NullLocator())
    else:
        set_scale("log", base=base)
        low, high = axis.get_view_interval()
        if low > 0 and base == 10 and high / low < 30:
            axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value, base)))


def _plain(value: float, base: int) -> str:
    """A tick in plain digits, and a negative power of 2, which has many, as a fraction."""
    return f"1/{1 / value:.0f}" if base == 2 and 0 < value < 1 else f"{value:.4g}"


def legend(figure: Figure, panels_with_labels: Sequence[Any] | None = None) -> None:
    """One legend for the whole figure, below all panels, where it covers no curve."""
    handles: dict[str, Any] = {}
    for panel in figure.axes if panels_with_labels is None else panels_with_labels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    widest = max(map(len, handles))
    columns = max(1, min(len(handles), int(13 * figure.get_figwidth() / (widest + 7))))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        frameon=False,
    )


def style(number: int) -> dict[str, Any]:
    """Colour and dashes of an arm by its number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(COLOURS)]}


def lines(panel: Any, x: NDArray, values: NDArray, label: str, number: int) -> None:
    """One arm `[seeds, steps]`: the median of the seeds thick, and each seed thin."""
    look = style(number)
    if len(values) > 1:
        panel.plot(x, values.T, color=look["color"], linewidth=0.5, alpha=0.3)
    marker = MARKERS[number % len(COLOURS)] if len(x) <= FEW else None
    median = np.median(values, axis=0)
    panel.plot(x, median, **look, marker=marker, markersize=4, label=label)


def errorbars(
    panel: Any, x: NDArray, values: NDArray, label: str, number: int, *, joined: bool = True
) -> None:
    """One arm `[seeds, points]`: means, joined by lines, and their standard errors as bars."""
    look = {
        **style(number),
        "marker": MARKERS[number % len(COLOURS)],
        "markersize": 4,
        "capsize": 2,
    }
    look |= {} if joined else {"linestyle": ""}
    error = values.std(axis=0) / max(len(values) - 1, 1) ** 0.5
    panel.errorbar(x, values.mean(axis=0), error, **look, label=label)


def histogram(panel: Any, values: NDArray, edges: NDArray, label: str, number: int) -> None:
    """How many values lie between two edges; those outside count in the first or last bin."""
    inside = np.clip(np.ravel(values), edges[0], edges[-1])
    panel.hist(inside, edges, histtype="step", linewidth=1.5, **style(number), label=label)


def curves(
    arrays: Arrays,
    unit: str,
    caption: str,
    *,
    names: dict[str, str] | None = None,
    apart: Sequence[str] = (),
) -> Figure:
    """Every curve of the arrays against its steps, in one panel per measure.

    Args:
        arrays: the arrays of a run; those named `curves/<arm>/<measure>` are drawn.
        unit: the unit of the steps.
        caption: a sentence that says what is shown.
        names: the name, with its unit, of each measure's axis; a measure without one is
            named as in the arrays.
        apart: one or two measures that each arm has in a unit of its own, such as the
            training and test loss of different maps; every arm has a panel of its own for
            these.
    """
    arms = arms_of(arrays)
    measures = list(dict.fromkeys(measure for arm in arms.values() for measure in arm))
    names = {measure: measure.replace("_", " ") for measure in measures} | (names or {})
    together = [measure for measure in measures if measure not in apart]
    own = list(arms) if apart else []
    titles = [names[measure].partition(",")[0] for measure in together]
    figure, axes = panels([*titles, *(f"{arm}: loss" for arm in own)], caption)
    for panel, measure in zip(axes, together, strict=False):
        for number, (arm, values) in enumerate(arms.items()):
            if measure in values:
                lines(panel, _steps(values[measure]), values[measure], arm, number)
        y_scale: Scale = "log" if "loss" in measure else "linear"
        finish(panel, unit, names[measure], y_scale=y_scale, whole=True)
    for number, (panel, arm) in enumerate(zip(axes[len(together) :], own, strict=True)):
        for measure, look in zip(apart, (TRAINING, number)[-len(apart) :], strict=True):
            lines(panel, _steps(arms[arm][measure]), arms[arm][measure], names[measure], look)
        finish(panel, unit, "loss", y_scale="log", whole=True)
        if len(apart) > 1:
            panel.legend(fontsize=7)
    legend(figure, axes[: len(together)])
    return figure


def _steps(values: NDArray) -> NDArray:
    return np.arange(1, values.shape[1] + 1)


def bars(panel: Any, groups: Sequence[str], values: dict[str, NDArray], form: str = "") -> None:
    """Bars of every arm side by side in each group, with its value above a bar if asked.

    Args:
        panel: the axes to draw on.
        groups: the names of the groups, below the axis.
        values: the heights of the bars of each arm, `[groups]`.
        form: format of the value that is written at each bar; empty for none.
    """
    places, width = np.arange(len(groups)), 0.8 / len(values)
    for number, (arm, heights) in enumerate(values.items()):
        shifted = places + width * (number - (len(values) - 1) / 2)
        look = {
            "color": COLOURS[number % len(COLOURS)],
            "hatch": HATCHES[number % len(COLOURS)],
            "edgecolor": "white",
        }
        drawn = panel.bar(shifted, heights, width, **look, label=arm)
        if form:
            written = [format(height, form) for height in heights]
            panel.bar_label(drawn, written, fontsize=7, padding=1, rotation=90)
    if form:
        panel.margins(y=0.25)
    panel.set_xticks(places, groups)


def heatmap(
    figure: Figure,
    panel: Any,
    values: NDArray,
    *,
    x: str,
    y: str,
    scale: str | None,
    numbers: Sequence[Sequence[str]] | None = None,
    low: float = 0.0,
    high: float = 1.0,
    extent: tuple[float, float, float, float] | None = None,
) -> Any:
    """Shades by value, with a bar that says what they mean, and numbers that can be read.

    Values of both signs have a colour for each sign, and 0 is white.

    Args:
        figure: the figure that the bar is added to.
        panel: the axes to draw on.
        values: the values, `[rows, columns]`.
        x: name of the columns.
        y: name of the rows.
        scale: what the shades mean; None where another panel's bar says it.
        numbers: text of each cell; black on light cells, white on dark ones.
        low: the value of the lightest shade.
        high: the value of the darkest shade.
        extent: left, right, low and high of the image, where they are not the indices.
    """
    shades = "RdBu" if low < 0 < high else "Blues"
    options: dict[str, Any] = {"cmap": shades, "vmin": low, "vmax": high, "aspect": "auto"}
    if extent is not None:
        options |= {"extent": extent, "origin": "lower"}
    image = panel.imshow(values, **options)
    finish(panel, x, y, whole=extent is None)
    panel.grid(visible=False)
    if scale is not None:
        figure.colorbar(image, ax=panel, label=scale)
    for row, texts in enumerate(numbers or ()):
        for column, text in enumerate(texts):
            red, green, blue, _ = image.cmap(image.norm(values[row, column]))
            is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            colour = "white" if is_dark else "black"
            panel.text(column, row, text, color=colour, ha="center", va="center", fontsize=7)
    return image


def confusion(
    figure: Figure, panel: Any, counts: NDArray, classes: Sequence[Any] | NDArray, *, what: str
) -> None:
    """How often each class, by row, was taken for each: a row sums to 1, numbers are per cent.

    Args:
        figure: the figure that the bar of shades is added to.
        panel: the axes to draw on.
        counts: how often class i was taken for class j, `[K, K]`.
        classes: the names of the classes; more than 20 are not written at the axes.
        what: what a class is called, such as "language".
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[f"{100 * share:.0f}" if share > 0.005 else "" for share in row] for row in shares]
    few = len(classes) <= 20
    names: dict[str, Any] = {
        "x": f"{what} predicted",
        "y": what,
        "scale": f"share of the {what}",
    }
    heatmap(figure, panel, shares, **names, numbers=texts if few else None)
    if few:
        slanted = {"rotation": 60} if max(len(str(name)) for name in classes) > 2 else {}
        panel.set_xticks(range(len(classes)), classes, **slanted)
        panel.set_yticks(range(len(classes)), classes)
