"""Figures of the identification tasks: which class's training examples influence which class's queries."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from datainf.evaluation.paired import confidence_interval
from datainf.study.plotting.style import label, legend_beside, look_of, ordered, row_of, shown_once, without_repeats


@shown_once
def by_method(
    points: pd.DataFrame, xlabel: str, title: str, *, references: Mapping[str, float], kinds: Mapping[str, str]
) -> Figure:
    """One panel side by side for each of several quantities, one row for each method, one marker for each kind; the
    axis is where the data and chance are.

    Args:
        points: columns panel, method, kind, value, error (half of its 95% interval), values being shares.
        references: panel -> where a line marks chance.
        kinds: kind -> "full" or "none", how its marker is filled.
    """
    points = without_repeats(points, "value")
    labels = ordered(points["method"])
    look = look_of(labels)
    panels = list(references)
    figure, axes = row_of(panels, width=3.4, height=0.42 * len(labels) + 1.9, legend=1.2)
    for axis, panel in zip(axes, panels, strict=True):
        some = points[points["panel"] == panel].assign(Method=points["method"].map(label))
        for place, (kind, fill) in enumerate(kinds.items()):
            rows = some[some["kind"] == kind].set_index("Method")
            for y, (name, colour, marker) in enumerate(zip(labels, look["palette"], look["markers"], strict=True)):
                if name in rows.index:
                    value, error = rows.loc[name, ["value", "error"]].astype(float)
                    axis.errorbar(
                        value,
                        y + 0.15 * (2 * place - len(kinds) + 1),
                        xerr=[[min(error, value)], [min(error, 1 - value)]],
                        color=colour,
                        marker=marker,
                        fillstyle=fill,
                        markersize=7,
                        linewidth=1.3,
                    )
        axis.axvline(references[panel], color="0.5", linestyle=":", linewidth=1)
        axis.set(title=panel)
        axis.locator_params(axis="x", nbins=4)
        axis.set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()  # shared by all panels
    figure.supxlabel(xlabel, fontsize=11)
    handles = [
        plt.Line2D([], [], color="0.2", marker="o", fillstyle=fill, linestyle="", label=kind)
        for kind, fill in kinds.items()
    ]
    handles.append(plt.Line2D([], [], color="0.5", linestyle=":", label="chance"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


NORMAL = 1.96  # standard errors on each side of a mean are its 95% interval
KINDS = {"by |score|": "full", "by helpfulness (-score)": "none"}


def class_detection(detection: pd.DataFrame, n_classes: int, title: str) -> Figure:
    """AUC and recall by method, by |score| and by helpfulness.

    `detection`: rows of `metrics.class_detection_table` of one loss, by method.
    """
    points = [
        {"panel": panel, "method": method, "kind": kind, "value": row[column], "error": NORMAL * row[f"{column}_se"]}
        for method, row in detection.iterrows()
        for panel, column_of in (("AUC", "auc"), ("recall", "recall"))
        for kind, column in zip(KINDS, (column_of, f"{column_of}_signed"), strict=True)
    ]
    return by_method(
        pd.DataFrame(points),
        "mean over the test examples (bars: 95% interval)",
        title,
        references={"AUC": 0.5, "recall": 1 / n_classes},
        kinds=KINDS,
    )


@shown_once
def by_loss(points: pd.DataFrame, title: str) -> Figure:
    """Class detection for each loss that the gradients may be of: a panel per quantity or task.

    `points` has the columns panel, method, loss and value; of several values mean and 95% confidence interval.
    """
    points = without_repeats(points, "value")
    labels = ordered(points["method"])
    panels = list(dict.fromkeys(points["panel"]))
    figure, axes = row_of(panels, width=3.7, height=3.8, legend=1.4)
    for axis, panel in zip(axes, panels, strict=True):
        sns.pointplot(
            points[points["panel"] == panel].assign(
                Method=lambda some: some["method"].map(label),
                loss=lambda some: some["loss"].str.replace("_", "\n"),
            ),
            x="loss",
            y="value",
            hue="Method",
            errorbar=lambda values: np.clip(confidence_interval(values), 0, 1),
            dodge=0.5,
            linestyle="none",
            markersize=6,
            err_kws={"linewidth": 1.2},
            ax=axis,
            **look_of(labels),
        )
        axis.set(title=panel, xlabel="loss whose gradients are compared", ylabel="")
    axes[0].set_ylabel("class detection")
    legend_beside(figure, axes)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def class_heat_maps(shares: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Which classes' training examples influence which classes' queries: one panel per method.

    `shares` maps a method to `metrics.class_shares`; every row of a panel sums to 100%.
    """
    highest = max(table.to_numpy().max() for table in shares.values())
    few = all(len(table) <= 15 for table in shares.values())  # more cells have no room for their numbers
    side = 1.6 + 0.3 * max(len(table) for table in shares.values())
    figure, axes = row_of(shares, width=side, height=side + 0.9, legend=1.2)
    for axis, (method, table) in zip(axes, shares.items(), strict=True):
        sns.heatmap(
            100 * table,
            vmin=0,
            vmax=100 * highest,
            cmap="cividis",
            annot=few,
            fmt=".0f",
            annot_kws={"fontsize": 9},
            square=True,
            cbar=False,
            ax=axis,
        )
        axis.set(title=label(method), xlabel="", ylabel="")
        axis.set_xticks(axis.get_xticks(), axis.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    axes[0].set_ylabel("class of the test examples")
    figure.supxlabel("class of the training examples", fontsize=11)
    figure.colorbar(axes[0].collections[0], ax=axes, label="share of the row's mean |score|, %", shrink=0.7)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def loss_curve(history: pd.DataFrame, by: str, what: str, title: str) -> Figure:
    """Training and test loss by `by`, "epoch" or "step"; `what` names the loss with its unit."""
    figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.plot(history[by], history["loss"], marker="o", color="#0072B2", label="training")
    axis.plot(history[by], history["query_loss"], marker="s", color="#D55E00", label="test")
    axis.set(xlabel=by, ylabel=what, title=title)
    axis.legend(frameon=False)
    return figure
