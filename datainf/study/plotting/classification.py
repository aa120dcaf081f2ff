"""Figures of the classification tasks: agreement with the exact influence, mislabeled examples, cost."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from datainf.evaluation.paired import confidence_interval
from datainf.study.plotting.style import (
    GROUP_COLOURS,
    LABELS,
    METHOD_STYLE,
    STAGES,
    grid_of,
    label,
    legend_beside,
    look_of,
    ordered,
    row_of,
    shown_once,
    without_repeats,
)


@shown_once
def by_rank(
    runs: pd.DataFrame,
    metric: str,
    ylabel: str,
    title: str,
    *,
    reference: float | None = None,
    within: tuple[float, float] = (0, 1),
) -> Figure:
    """A metric by LoRA rank, one panel per dataset, one line per method: the mean over seeds with its 95% confidence
    interval, and a small point for each seed. DataInf is drawn thick and last.

    The figure of the paper's Figures 1, 2 and 5. `runs` has one row per run and method; `reference` draws a line
    such as chance. No interval is drawn beyond what the metric can be, `within`.
    """
    runs = without_repeats(runs, metric).assign(Method=runs["method"].map(label))
    labels = ordered(runs["method"])
    look = look_of(labels)
    datasets, ranks = list(dict.fromkeys(runs["dataset"])), sorted(runs["rank"].unique())
    figure, axes = row_of(datasets, width=3.6, height=3.9, legend=1)
    for axis, dataset in zip(axes, datasets, strict=True):
        some = runs[runs["dataset"] == dataset]
        for place, (name, colour, marker) in enumerate(zip(labels, look["palette"], look["markers"], strict=True)):
            own = some[some["Method"] == name]
            aside = 0.45 * ((place + 0.5) / len(labels) - 0.5)
            ours = name == LABELS["datainf"]
            axis.scatter(own["rank"].map(ranks.index) + aside, own[metric], s=9, color=colour, alpha=0.4, linewidth=0)
            of_rank = own.groupby("rank")[metric]
            means = of_rank.mean()
            limits = np.array([confidence_interval(values) for _, values in of_rank]).reshape(-1, 2).clip(*within)
            axis.errorbar(
                [ranks.index(rank) + aside for rank in means.index],
                means,
                np.abs(limits - means.to_numpy()[:, None]).T,
                color=colour,
                marker=marker,
                linewidth=2.4 if ours else 1.2,
                elinewidth=1.2,
                zorder=4 if ours else 3,
                label=name,
            )
        if reference is not None:
            axis.axhline(reference, color="0.5", linestyle=":", linewidth=1)
        axis.set(title=dataset, xlabel="LoRA rank", ylabel=ylabel if axis is axes[0] else "")
        axis.set_xticks(range(len(ranks)), ranks)
        axis.grid(axis="x", visible=False)
    legend_beside(figure, axes)
    of_panels = runs.groupby("dataset")["seed"].nunique()
    seeds, n = (
        " to ".join(str(value) for value in sorted({each.min(), each.max()})) for each in (of_panels, runs["n_train"])
    )
    how = f"mean of {seeds} seed{'s' * (seeds != '1')} (small points), n = {n} training examples; bars: 95% interval"
    figure.suptitle(f"{title}\n{how}", fontsize=12)
    return figure


@shown_once
def cost(runs: pd.DataFrame, title: str) -> Figure:
    """Seconds of each stage (left, logarithmic) and peak memory of the influence stages (right), by method.

    The gradients are the same for every method and are drawn as a line to hold the others against.
    """
    labels = ordered(runs["method"])
    runs = runs.assign(Method=runs["method"].map(label), peak=runs[["peak_mib_ihvp", "peak_mib_scores"]].max(axis=1))
    means = runs.groupby("Method")[["seconds_ihvp", "seconds_scores", "peak"]].mean().loc[labels]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.42 * len(labels) + 1.6), sharey=True, layout="constrained", width_ratios=[3, 2]
    )
    for stage, colour, marker in (("seconds_ihvp", "#0072B2", "o"), ("seconds_scores", "#56B4E9", "s")):
        left.plot(means[stage], labels, color=colour, marker=marker, markersize=8, linestyle="", label=STAGES[stage])
    gradients = runs["seconds_gradients"].mean()
    left.axvline(gradients, color="0.3", linestyle="--", linewidth=1.2, label=f"gradients: {gradients:.2g} s")
    left.set(xscale="log", xlabel="seconds (log scale)", ylabel="")
    left.margins(y=0.1)
    left.invert_yaxis()  # shared by both
    right.barh(labels, means["peak"], color="0.6", height=0.6)
    right.set(xlabel="peak memory beyond the gradients, MiB")
    right.grid(axis="y", visible=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{title} (mean of {runs.groupby(['dataset', 'rank', 'seed']).ngroups} runs)", fontsize=12)
    return figure


FOCUS = ("hessian_free", "datainf", "exact")


@shown_once
def detection_curves(curves: pd.DataFrame, title: str, *, focus: Sequence[str] = FOCUS) -> Figure:
    """Share of the mislabeled examples found against the share of all examples inspected, most harmful first.

    `curves` has the columns dataset, method, seed, inspected, found. Bands: 95% confidence interval over seeds, of the
    methods in `focus`; the others are thin and grey.
    """
    datasets = list(dict.fromkeys(curves["dataset"]))
    figure, axes = row_of(datasets, width=3.4, height=3.9, legend=1.4)
    for axis, dataset in zip(axes, datasets, strict=True):
        some = curves[curves["dataset"] == dataset]
        axis.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, label="picked at random")
        others = some[~some["method"].isin(focus)]
        for place, (_, of_method) in enumerate(others.groupby("method", sort=False)):
            found = of_method.groupby("inspected")["found"].mean()
            axis.plot(found.index, found, color="0.75", linewidth=1, label="" if place else "the other methods")
        for method, style in zip(focus, ("-.", "-", "--", ":"), strict=False):
            of_points = some[some["method"] == method].groupby("inspected")["found"]
            if of_points.ngroups == 0:
                continue
            low, high = np.array([confidence_interval(values) for _, values in of_points]).clip(0, 1).T
            name, colour, _ = METHOD_STYLE[method]
            found, width = of_points.mean(), 2.2 if method == "datainf" else 1.5
            axis.fill_between(found.index, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.plot(found.index, found, color=colour, linestyle=style, linewidth=width, label=name)
        axis.set(
            title=dataset,
            xlabel="share of examples inspected",
            ylabel="share of mislabeled found" if axis is axes[0] else "",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
    legend_beside(figure, axes)
    figure.suptitle(title, fontsize=12)
    return figure


def _shown(scores: pd.DataFrame) -> list[str]:
    """The methods that have a column, LiSSA as published among them only where it differs from LiSSA."""
    methods = [method for method in METHOD_STYLE if method in scores]
    if {"lissa", "lissa_as_published"} <= set(methods) and scores["lissa"].corr(scores["lissa_as_published"]) > 0.999:
        methods.remove("lissa_as_published")
    return methods


@shown_once
def detection_ranks(scores: pd.DataFrame, title: str) -> Figure:
    """Where the mislabeled examples stand in each method's ranking, most harmful first: one stroke for each.

    `scores` has a column per method and the bool column "flipped"; positive scores are harmful.
    """
    methods = _shown(scores)
    flipped = scores["flipped"].to_numpy()
    ranks = {method: scores[method].rank(ascending=False, method="first")[flipped] for method in methods}
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(methods) + 1.6), layout="constrained")
    colours = [METHOD_STYLE[method][1] for method in methods]
    axis.eventplot(list(ranks.values()), lineoffsets=range(len(methods)), linelengths=0.7, linewidths=1, colors=colours)
    axis.axvline(flipped.sum() + 0.5, color="0.3", linestyle="--", linewidth=1)
    for row, method in enumerate(methods):
        share = (ranks[method] <= flipped.sum()).mean()
        axis.annotate(f"{share:.0%}", (1.01, row), xycoords=axis.get_yaxis_transform(), va="center", fontsize=11)
    axis.annotate("left of it", (1.01, -0.75), xycoords=axis.get_yaxis_transform(), fontsize=9, color="0.3")
    axis.set_yticks(range(len(methods)), [label(method) for method in methods])
    axis.set(
        xlim=(0.5, len(scores) + 0.5),
        xlabel=f"place in the ranking; dashed: as many as are mislabeled, {flipped.sum()}",
    )
    axis.invert_yaxis()
    axis.grid(visible=False)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def against_exact(scores: pd.DataFrame, title: str) -> Figure:
    """Each method's scores against the exact ones, one panel per method, standardized so that panels compare.

    `scores` has one column per method, "exact" among them, and a row per training example, and may have a bool
    column "flipped" that marks mislabeled ones.
    """
    methods = [method for method in _shown(scores) if method != "exact"]
    methods += [method for method in scores if method not in LABELS and method != "flipped"]
    standard = scores.drop(columns="flipped", errors="ignore")
    standard = (standard - standard.mean()) / standard.std()
    flipped = scores.get("flipped", pd.Series(False, index=scores.index)).to_numpy()
    figure, axes = grid_of(methods, width=3.3, height=3.2, columns=3, sharex=True, sharey=True)
    for axis, method in zip(axes, methods, strict=True):
        for (name, colour), group in zip(GROUP_COLOURS.items(), (~flipped, flipped), strict=True):
            axis.scatter(standard["exact"][group], standard[method][group], s=9, alpha=0.6, color=colour, label=name)
        r = standard[method].corr(standard["exact"])
        axis.set(title=f"{label(method)}  (r = {r:.2f})")
        axis.axline((0, 0), slope=1, color="0.5", linewidth=1, linestyle=":")
    figure.supxlabel("exact score (standardized)", fontsize=11)
    figure.supylabel("score of the method (standardized)", fontsize=11)
    if flipped.any():
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def fine_tuning_curve(history: pd.DataFrame, majority: float) -> Figure:
    """Training loss and validation accuracy by epoch, against always answering the majority class."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3), layout="constrained")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.plot(history["epoch"], history["loss"], marker="o", color="#0072B2")
    left.set(xlabel="epoch", ylabel="mean training loss, nats", title="Training loss (noisy labels)")
    right.plot(history["epoch"], history["accuracy"], marker="o", color="#0072B2")
    right.axhline(majority, color="0.5", linestyle=":")
    right.text(
        history["epoch"].iloc[-1],
        majority,
        "majority class",
        ha="right",
        va="bottom",
        fontsize=9,
        color="0.4",
    )
    right.set(xlabel="epoch", ylabel="accuracy", title="Validation accuracy (clean labels)", ylim=(None, 1.0))
    return figure
