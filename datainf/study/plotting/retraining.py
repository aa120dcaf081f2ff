"""Figures of the ground truth: how well scores predict what retraining does."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from datainf.evaluation.counterfactual import Estimate
from datainf.study.plotting.style import METHOD_STYLE, grid_of, label, shown_once

GREY = ("", "#888888", "P")


@shown_once
def leaderboard(tables: Mapping[str, pd.DataFrame], ceilings: Mapping[str, Estimate], title: str) -> Figure:
    """Every method's LDS with its 95% interval, one panel for each design, the best of the first panel on top.

    Args:
        tables: of `counterfactual.lds_table`, by what the panel is to say.
        ceilings: what a perfect predictor would reach, of some of the panels.
    """
    order = list(next(iter(tables.values())).index)[::-1]
    figure, axes = grid_of(list(tables), width=4.6, height=0.32 * len(order) + 1.5, columns=2, sharey=True, sharex=True)
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        for place, method in enumerate(order):
            if method not in table.index:
                continue
            row, (_, colour, marker) = table.loc[method], METHOD_STYLE.get(method, GREY)
            axis.errorbar(
                row["lds"],
                place,
                xerr=[[row["lds"] - row["low"]], [row["high"] - row["lds"]]],
                marker=marker,
                linestyle="none",
                color=colour,
                markeredgecolor="0.3",
                markersize=7,
                capsize=2,
            )
        axis.axvline(0, color="0.6", linewidth=1)
        if name in ceilings:
            found = ceilings[name]
            axis.axvspan(found.low, found.high, color="#009E73", alpha=0.12)
            axis.axvline(found.value, color="#009E73", linestyle="--", linewidth=1.2, label="a perfect predictor")
            axis.legend(loc="lower right", frameon=False, fontsize=9)
        axis.set(title=name, xlabel="LDS (Spearman correlation)", yticks=range(len(order)))
        axis.set_yticklabels([label(method) for method in order])
    figure.suptitle(f"{title}\nmean over queries; bars: 95% bootstrap interval over queries and subsets", fontsize=12)
    return figure


@shown_once
def by_task(lds: pd.DataFrame, title: str) -> Figure:
    """The LDS of all tasks: a panel per dataset and rank, a row per method, a mark per design with its 95% interval.

    Args:
        lds: of `tables.lds_over_seeds`.
    """
    designs = list(dict.fromkeys(lds["design"]))
    looks = dict(zip(designs, [("#0072B2", "o"), ("#56B4E9", "s"), ("#D55E00", "^"), ("#E69F00", "D")], strict=False))
    order = list(lds.groupby("method")["lds"].mean().sort_values().index)
    panels = list(dict.fromkeys(zip(lds["dataset"], lds["rank"], strict=True)))
    figure, axes = grid_of(panels, width=4.2, height=0.36 * len(order) + 1.3, columns=3, sharey=True, sharex=True)
    for axis, (dataset, rank) in zip(axes, panels, strict=True):
        some = lds[(lds["dataset"] == dataset) & (lds["rank"] == rank)]
        for shift, design in enumerate(designs):
            rows = some[some["design"] == design]
            if rows.empty:
                continue
            colour, marker = looks[design]
            places = np.array([order.index(method) for method in rows["method"]]) + 0.17 * (1.5 - shift)
            errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["lds"].to_numpy())
            axis.errorbar(
                rows["lds"], places, xerr=errors, fmt=marker, color=colour, markersize=4.5, linewidth=1, label=design
            )
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set(title=f"{dataset}, rank {rank}", xlabel="LDS (Spearman correlation)", yticks=range(len(order)))
        axis.set_yticklabels([label(method) for method in order])
        axis.tick_params(labelbottom=True)  # of a panel with none below it too
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    seeds = " to ".join(map(str, sorted({lds["seeds"].min(), lds["seeds"].max()})))
    how = f"at least {lds['retrainings'].min()} retrainings of each design, {seeds} seed{'s' * (seeds != '1')}"
    figure.suptitle(f"{title}\n{how}; bars: 95% bootstrap interval over queries and subsets", fontsize=12)
    return figure


@shown_once
def calibration(
    predicted: Mapping[str, Float[np.ndarray, " s"]],
    actual: Float[np.ndarray, " s"],
    slopes: Mapping[str, Estimate],
    title: str,
) -> Figure:
    """The predicted change of the mean query's loss against the actual one, a panel per method, a point per subset."""
    figure, axes = grid_of(list(predicted), width=3.6, height=3.5, columns=3, sharey=True)
    for axis, (method, x) in zip(axes, predicted.items(), strict=True):
        _, colour, marker = METHOD_STYLE.get(method, GREY)
        axis.scatter(x, actual, color=colour, marker=marker, s=22, alpha=0.6)
        ends = np.array([x.min(), x.max()])
        slope = slopes[method]
        axis.plot(ends, actual.mean() + slope.value * (ends - x.mean()), color="0.2", linewidth=1.4, label="fitted")
        axis.plot(ends, actual.mean() + (ends - x.mean()), color="0.5", linestyle=":", label="slope 1")
        axis.set_ylim(actual.min() - 0.1 * np.ptp(actual), actual.max() + 0.1 * np.ptp(actual))
        axis.set(
            title=f"{label(method)}\nslope {slope.value:.2g} [{slope.low:.2g}, {slope.high:.2g}]",
            xlabel="predicted change, nats",
        )
    axes[0].set_ylabel("actual change, nats")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def ensembles(table: pd.DataFrame, title: str) -> Figure:
    """LDS by the number of fine-tuned models whose scores are averaged; columns method, members, lds, low, high."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    methods = list(dict.fromkeys(table["method"]))
    for place, method in enumerate(methods):
        rows, (_, colour, marker) = table[table["method"] == method], METHOD_STYLE.get(method, GREY)
        errors = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["lds"].to_numpy(float))
        beside = rows["members"] + 0.06 * (place - (len(methods) - 1) / 2)
        axis.errorbar(
            beside, rows["lds"], yerr=errors, color=colour, marker=marker, linewidth=1, capsize=2, label=label(method)
        )
    axis.set(
        xlabel="models averaged over",
        ylabel="LDS (Spearman correlation)",
        title=title,
        xticks=sorted(table["members"].unique()),
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
