"""Lines with their names beside them, instead of in a legend."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import offset_copy
from scipy.optimize import isotonic_regression

from datainf.study.plotting.style import LABELS, METHOD_STYLE, grid_of, shown_once

Look = tuple[str, str, str]
"""Colour, line style and marker of a line; the marker "" is none."""

GUIDE: Look = ("0.55", ":", "")
"""The look of a line that is no measurement: a bound, a slope, a reference."""


def look(method: str, line_style: str = "-", marker: str | None = None) -> Look:
    """The look that a method has in every figure, as a line."""
    _, colour, own_marker = METHOD_STYLE[method]
    return colour, line_style, own_marker if marker is None else marker


@shown_once
def lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    line: str,
    looks: Mapping[str, Look],
    title: str,
    xlabel: str | Mapping[str, str],
    ylabel: str | Mapping[str, str],
    panel: str | None = None,
    log: str = "xy",
    width: float = 6.2,
    height: float = 4.2,
    columns: int = 2,
    ylim: tuple[float | None, float | None] | None = None,
) -> Figure:
    """Lines, each with its name at its right end instead of in a legend.

    Args:
        table: one row per point. The column `line` names the line, `panel` the panel, where there are several.
        looks: line -> colour, line style and marker, in the order of drawing. Names of methods are written as
            readers know them; a line whose name begins with "_" gets no label.
        xlabel, ylabel: of every panel, or panel -> label.
        log: which axes are logarithmic: "x", "y", "xy" or "".
    """
    panels = list(dict.fromkeys(table[panel])) if panel else [None]
    figure, axes = grid_of(panels, width=width, height=height, columns=columns)
    for axis, name in zip(axes, panels, strict=True):
        some = table if panel is None else table[table[panel] == name]
        axis.set(
            xscale="log" if "x" in log else "linear",
            yscale="log" if "y" in log else "linear",
            xlabel=xlabel if isinstance(xlabel, str) else xlabel[name],
            ylabel=ylabel if isinstance(ylabel, str) else ylabel[name],
            title=name,
        )
        ends = []
        for key, (colour, line_style, marker) in looks.items():
            points = some[some[line] == key].dropna(subset=[x, y])
            if points.empty:
                continue
            axis.plot(points[x], points[y], color=colour, linestyle=line_style, marker=marker, markersize=5)
            if not key.startswith("_"):
                ends.append((LABELS.get(key, key), colour, points[x].iloc[-1], points[y].iloc[-1]))
        if ylim is not None:
            axis.set_ylim(*ylim)
        if "x" in log:
            _mark(axis, np.unique(some[x]))
        name_ends(figure, axis, ends)
    figure.suptitle(title, fontsize=12)
    return figure


def _mark(axis: Axes, values: np.ndarray) -> None:
    """On a logarithmic x-axis that has too few powers of ten to read, mark some of the values themselves."""
    axis.xaxis.set_minor_formatter(NullFormatter())
    few = len(values) <= 6
    if few or values[-1] / values[0] < 100:
        evenly = np.geomspace(values[0], values[-1], 4)
        nearest = np.unique([values[np.abs(np.log(values / at)).argmin()] for at in evenly])
        some = values if few else nearest
        axis.set_xticks(some, [f"{value:,g}" for value in some])
        axis.set_xticks([], minor=True)


def name_ends(figure: Figure, axis: Axes, ends: Sequence[tuple[str, str, float, float]], size: float = 9) -> None:
    """Write each line's name right of its last point; names that would overlap move apart, up and down."""
    if not ends:
        return
    axis.figure.draw_without_rendering()
    low, high = axis.get_window_extent().y0, axis.get_window_extent().y1
    ends = sorted(ends, key=lambda end: axis.transData.transform(end[2:])[1])
    wanted = np.clip([axis.transData.transform(end[2:])[1] for end in ends], low, high)
    gap = 1.25 * size * figure.dpi / 72
    placed = _apart(wanted, gap)
    placed = np.maximum(placed, low + gap * (0.5 + np.arange(len(placed))))  # above the axis, whose ticks are below
    right = max(end[2] for end in ends)
    for (text, colour, x, y), target, own in zip(ends, placed, wanted, strict=True):
        shifted = offset_copy(axis.transData, figure, x=6, y=(target - own) * 72 / figure.dpi, units="points")
        y = axis.transData.inverted().transform((0, own))[1]
        at = right if x > 0.8 * right else x
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.text(at, y, text, color=_readable(colour), fontsize=size, va="center", transform=shifted, bbox=behind)


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """The places nearest to the `wanted` ones, which are in order, that keep a `gap` between neighbours."""
    gaps = gap * np.arange(len(wanted))
    return isotonic_regression(wanted - gaps).x + gaps


def _readable(colour: str) -> tuple[float, float, float]:
    """The colour for text on white: light ones darkened until they can be read, and told apart in grey."""
    red, green, blue = to_rgb(colour)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    darker = min(1, 0.45 / luminance) if luminance else 1
    return red * darker, green * darker, blue * darker
