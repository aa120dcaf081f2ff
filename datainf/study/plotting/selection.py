"""Figures of notebook 75: what a model is worth that was fine-tuned on what a score has chosen."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from datainf.study.plotting.style import METHOD_STYLE, grid_of, legend_beside, shown_once

SELECTIONS = {"keep": "the most harmful left out", "relabel": "the most harmful given the other label"}
"""What was done by a score, of each design of `evaluation.selection`."""


GAINS = {
    "accuracy": ("accuracy over that of all data, points", 100),
    "loss": ("loss below that of all data, nats", 1),
}


@shown_once
def by_share(table: pd.DataFrame, title: str, *, of: Sequence[str] = ("accuracy", "loss")) -> Figure:
    """What each choice gains over fine-tuning on all data, by the share of the data that it leaves as it is.

    Args:
        table: columns design, method, share, and of each measure its gain, low and high; see `selection.worth`.
        of: the measures, a row of panels each.
    """
    designs = list(dict.fromkeys(table["design"]))
    panels = [(measure, design) for measure in of for design in designs]
    figure, axes = grid_of(panels, width=5.6, height=3.9, columns=len(designs), sharex=True)
    known = set(table["method"])
    methods = [method for method in METHOD_STYLE if method in known] + sorted(known - METHOD_STYLE.keys())
    for axis, (measure, design) in zip(axes, panels, strict=True):
        some, (ylabel, unit) = table[table["design"] == design], GAINS[measure]
        for place, method in enumerate(methods):
            rows = some[some["method"] == method].sort_values("share")
            name, colour, marker = METHOD_STYLE.get(method, (method, "#888888", "P"))
            gain, low, high = (unit * rows[f"{measure}_{end}"] for end in ("gain", "low", "high"))
            aside = 0.35 * (place - len(methods) / 2)  # bars beside each other
            look = {"color": colour, "marker": marker, "label": name, "linewidth": 1.4, "elinewidth": 0.8}
            axis.errorbar(100 * rows["share"] + aside, gain, yerr=[gain - low, high - gain], **look)
        axis.axhline(0, color="0.2", linewidth=1)
        axis.set(title=SELECTIONS.get(design, design), xlabel="examples left as they are, %", ylabel=ylabel)
    axes[0].invert_xaxis()
    legend_beside(figure, axes)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def against_loss(harm: np.ndarray, losses: np.ndarray, marked: Mapping[str, np.ndarray], title: str) -> Figure:
    """Each training example's loss and what it does to the mean query, with some examples marked.

    Args:
        harm: scores for the mean query, > 0 harmful; losses: nats; of n examples each.
        marked: name -> which examples, drawn over one another in this order.
    """
    figure, (axis,) = grid_of([""], width=6.8, height=4.4, columns=1)
    axis.scatter(losses, harm, s=14, color="0.6", label=f"training examples, n = {len(harm)}")
    for (name, chosen), colour, size in zip(marked.items(), ("#D55E00", "#0072B2"), (70, 160), strict=False):
        look = {"facecolors": "none", "edgecolors": colour, "linewidths": 1.6}
        axis.scatter(losses[chosen], harm[chosen], s=size, label=name, **look)
    axis.axhline(0, color="0.2", linewidth=1)
    axis.set(title=title, xlabel="loss of the training example, nats", ylabel="score for the mean query (> 0 harmful)")
    axis.set_yscale("symlog", linthresh=max(np.quantile(np.abs(harm), 0.5), 1e-12))
    axis.legend(frameon=False, fontsize=9)
    return figure


@shown_once
def group_changes(predicted: pd.DataFrame, actual: pd.DataFrame, title: str) -> Figure:
    """What leaving out each group does to the queries of each group, as predicted and as retraining finds it.

    Args:
        predicted, actual: a row per group of queries and a column per group left out; changes of the mean loss, nats.
    """
    figure, axes = grid_of(["predicted", "retrained"], width=5.4, height=4.8, columns=2)
    for axis, (name, table) in zip(axes, {"predicted": predicted, "retrained": actual}.items(), strict=True):
        limit = max(np.abs(table.to_numpy()).max(), 1e-12)
        shown = axis.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_xticks(range(table.shape[1]), table.columns, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(table.shape[0]), table.index, fontsize=8)
        axis.set(title=f"{name}, nats", xlabel="left out", ylabel="queries of")
        axis.grid(False)
        figure.colorbar(shown, ax=axis, shrink=0.75)
    figure.suptitle(title, fontsize=12)
    return figure
