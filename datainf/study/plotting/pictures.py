"""Figures that show pictures: what a model draws, and which training pictures that comes from."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from datainf.study.plotting.style import label, look_of, ordered, row_of, shown_once

SIDE = 1.15  # inches of a picture
MOST, LEAST = "#D55E00", "#0072B2"


@shown_once
def picture_grid(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str], title: str) -> Figure:
    """Pictures in rows that have names, under `columns`, one name for each picture of a row ("" for none)."""
    figure, axes = _grid(len(rows), len(columns))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            _show(axis, picture)
        line[0].set_ylabel(name, fontsize=11)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def influential_pictures(
    queries: Sequence[tuple[Image.Image, str]],
    train: Sequence[tuple[Image.Image, str]],
    scores: Float[np.ndarray, "queries n"],
    title: str,
    k: int = 4,
) -> Figure:
    """Each query picture with its `k` most and `k` least influential training pictures (the paper's Figure 3).

    Pictures come with their class. Most influential are the largest |scores|, least influential the smallest; the
    number on a picture is its score as a share of the row's largest.
    """
    figure, axes = _grid(len(queries), 2 * k + 1, gap=0.35)
    for line, (picture, name), row in zip(axes, queries, scores, strict=True):
        order = np.argsort(-np.abs(row), kind="stable")
        _show(line[0], picture, name)
        for places, some, colour in ((line[1 : k + 1], order[:k], MOST), (line[k + 1 :], order[: -k - 1 : -1], LEAST)):
            for axis, index in zip(places, some, strict=True):
                _show(axis, *train[index], frame=colour)
                axis.set_xlabel(f"{row[index] / np.abs(row).max():+.2g}", fontsize=8, labelpad=2)
    for axis, text, colour in (
        (axes[0][0], "test picture", "black"),
        (axes[0][1], "most influential", MOST),
        (axes[0][k + 1], "least influential", LEAST),
    ):
        heading = axis.annotate(text, (0, 1.2), xycoords="axes fraction", color=colour, fontsize=11)
        heading.set_in_layout(False)  # or its width would push the columns apart
    figure.suptitle(title + "\n", fontsize=12)  # with room for the headings
    return figure


@shown_once
def places_of_influence(
    queries: Sequence[tuple[Image.Image, str]],
    train: Sequence[tuple[Image.Image, str]],
    places: Float[np.ndarray, "pairs height width"],
    title: str,
) -> Figure:
    """Query pictures, under each a training picture and, place by place, what it does to the query's loss."""
    figure, axes = _grid(3, len(queries))
    figure.set_figwidth(figure.get_figwidth() + 1)  # for the bar
    for query, one, shares, column in zip(queries, train, places, axes.T, strict=True):
        _show(column[0], *query)
        _show(column[1], *one)
        largest = max(np.abs(shares).max(), np.finfo(float).tiny)
        image = column[2].imshow(shares / largest, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        column[2].set(xticks=[], yticks=[])
        column[2].grid(False)
    for axis, name in zip(axes[:, 0], ("test picture", "training\npicture", "its places"), strict=True):
        axis.set_ylabel(name, fontsize=11)
    bar = figure.colorbar(image, ax=axes[2], shrink=0.9, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["helpful", "0", "harmful"], fontsize=8)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def stability(points: pd.DataFrame, title: str) -> Figure:
    """How scores settle as the loss averages over more draws of noise: a panel per quantity, a line per method.

    `points` has the columns panel, method, draws and value.
    """
    labels = ordered(points["method"])
    panels = list(dict.fromkeys(points["panel"]))
    figure, axes = row_of(panels, width=4.2, height=3.6, legend=1.5)
    for axis, panel in zip(axes, panels, strict=True):
        sns.lineplot(
            points[points["panel"] == panel].assign(Method=lambda some: some["method"].map(label)),
            x="draws",
            y="value",
            hue="Method",
            style="Method",
            style_order=labels,
            dashes=False,
            errorbar=None,
            ax=axis,
            **look_of(labels),
        )
        axis.set(title=panel, xlabel="draws of noise for each timestep", ylabel="", ylim=(None, 1.02))
        axis.set_xticks(sorted(points["draws"].unique()))
        axis.get_legend().remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def _grid(rows: int, columns: int, gap: float = 0.0) -> tuple[Figure, np.ndarray]:
    """Axes for rows x columns pictures; `gap` is the room below each for its number, as a share of its side."""
    size = (SIDE * columns + 0.4, SIDE * (1.03 + gap) * rows + 0.8)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _show(axis: Axes, picture: Image.Image, name: str = "", frame: str = "none") -> None:
    """A picture without axes, enlarged so that its pixels stay what they are."""
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(name, fontsize=8, pad=2)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for side in axis.spines.values():
        side.set(visible=frame != "none", edgecolor=frame, linewidth=2)
