"""Figures of notebook 71: what damping does, and how smooth a fine-tuning is."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from datainf.study.plotting.named_lines import name_ends
from datainf.study.plotting.style import METHOD_STYLE, grid_of, label, shown_once

LAST = "datainf"  # drawn over the others, and thicker


@shown_once
def by_damping(
    table: pd.DataFrame,
    title: str,
    *,
    y: str = "lds",
    ylabel: str = "LDS (Spearman correlation)",
    marks: Mapping[str, float] | None = None,
    ceilings: Mapping[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """A line per method against the damping, each with its name at its right end, a panel per design.

    Args:
        table: columns design, method, damping, `y`, and where there is an interval low and high, drawn of the line
            that reaches highest.
        marks: method -> a damping to mark on its line.
        ceilings: design -> what a perfect predictor would reach.
        colours: of lines that are no method of the study.
    """
    panels = list(dict.fromkeys(table["design"]))
    figure, axes = grid_of(panels, width=6.2, height=4.4, columns=2, sharey=True)
    ends_of = []
    for axis, design in zip(axes, panels, strict=True):
        some, ends = table[table["design"] == design], []
        highest = some.loc[some[y].idxmax(), "method"]
        for method in sorted(some["method"].unique(), key=lambda name: name == LAST):
            rows = some[some["method"] == method].sort_values("damping")
            _, colour, marker = METHOD_STYLE.get(method, ("", (colours or {}).get(method, "#888888"), ""))
            thick = 3.2 if method == LAST else 1.5
            axis.plot(rows["damping"], rows[y], color=colour, marker=marker, markersize=5, linewidth=thick)
            if method == highest and "low" in rows:
                axis.fill_between(rows["damping"], rows["low"], rows["high"], color=colour, alpha=0.12, linewidth=0)
            if marks and method in marks:
                near = rows.iloc[(rows["damping"] / marks[method] - 1).abs().argmin()]
                axis.plot(near["damping"], near[y], marker="*", markersize=15, color=colour, markeredgecolor="0.2")
            ends.append((label(method), colour, rows["damping"].iloc[-1], rows[y].iloc[-1]))
        if ceilings and design in ceilings:
            axis.axhline(ceilings[design], color="#009E73", linestyle="--", linewidth=1.2)
            axis.annotate(
                "a perfect predictor", (0.02, ceilings[design]), xycoords=("axes fraction", "data"), fontsize=9
            )
        axis.set(xscale="log", title=design, xlabel="damping, in units of a layer's mean eigenvalue", ylabel=ylabel)
        ends_of.append(ends)
    for axis, ends in zip(axes, ends_of, strict=True):  # when all panels have the limits that they share
        name_ends(figure, axis, ends)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def along_weights(table: pd.DataFrame, tangents: pd.DataFrame, title: str) -> Figure:
    """The mean query's loss as one example's weight goes from 0 to 1, and what the derivative at 1 says of it.

    Args:
        table: columns recipe, example, weight, change (of the loss, from that at weight 1, in nats).
        tangents: columns recipe, example, slope.
    """
    recipes = list(dict.fromkeys(table["recipe"]))
    figure, axes = grid_of(recipes, width=5.2, height=4.0, columns=2)
    for axis, recipe in zip(axes, recipes, strict=True):
        some = table[table["recipe"] == recipe]
        for colour, (example, rows) in zip(
            plt.rcParams["axes.prop_cycle"].by_key()["color"], some.groupby("example"), strict=False
        ):
            rows = rows.sort_values("weight")
            axis.plot(rows["weight"], rows["change"], marker="o", color=colour, label=f"example {example}")
            own = tangents[(tangents["recipe"] == recipe) & (tangents["example"] == example)]
            ends = rows["weight"].iloc[[0, -1]]
            axis.plot(ends, own["slope"].item() * (ends - 1), color=colour, linestyle=":")
        axis.set(title=recipe, xlabel="the example's weight", ylabel="change of the mean query's loss, nats")
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{title}\ndots: fine-tunings; dotted: the derivative at weight 1", fontsize=12)
    return figure
