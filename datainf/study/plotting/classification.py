"""Figures of the classification tasks: agreement with the exact influence, mislabeled examples, cost."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
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
)


@shown_once
def by_rank(runs: pd.DataFrame, metric: str, ylabel: str, title: str, *, reference: float | None = None) -> Figure:
    """Mean and 95% confidence interval of a metric by LoRA rank, one panel per dataset, one line per method.

    The figure of the paper's Figures 1, 2 and 5. `runs` has one row per run and method; `reference` draws a line
    such as chance.
    """
    runs = runs.assign(Method=runs["method"].map(label), Rank=runs["rank"])
    labels = ordered(runs["method"])
    datasets = list(dict.fromkeys(runs["dataset"]))
    figure, axes = row_of(datasets, width=3.6, height=3.9, legend=1)
    for axis, dataset in zip(axes, datasets, strict=True):
        some = runs[runs["dataset"] == dataset]
        sns.pointplot(
            some,
            x="Rank",
            y=metric,
            hue="Method",
            errorbar=confidence_interval,
            dodge=0.45,
            linewidth=1.2,
            markersize=6,
            err_kws={"linewidth": 1.2},
            ax=axis,
            **look_of(labels),
        )
        if reference is not None:
            axis.axhline(reference, color="0.5", linestyle=":", linewidth=1)
        axis.set(title=dataset, xlabel="LoRA rank", ylabel=ylabel)
    legend_beside(figure, axes)
    seeds, sizes = runs["seed"].nunique(), sorted({runs["n_train"].min(), runs["n_train"].max()})
    n = " to ".join(str(size) for size in sizes)
    how = f"mean of {seeds} seed{'s' * (seeds > 1)}, n = {n} training examples; bars: 95% confidence interval"
    figure.suptitle(f"{title}\n{how}", fontsize=12)
    return figure


@shown_once
def cost(runs: pd.DataFrame, title: str) -> Figure:
    """Seconds of each stage (left, logarithmic) and peak memory of the influence stages (right), by method.

    The gradients are the same for every method and are drawn as a line to hold the others against.
    """
    labels = ordered(runs["method"])
    runs = runs.assign(Method=runs["method"].map(label))
    stages = runs.melt("Method", ["seconds_ihvp", "seconds_scores"], var_name="Stage", value_name="seconds").replace(
        {"Stage": STAGES}
    )
    memory = runs.assign(peak=runs[["peak_mib_ihvp", "peak_mib_scores"]].max(axis=1))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.42 * len(labels) + 1.6), sharey=True, layout="constrained", width_ratios=[3, 2]
    )
    sns.barplot(
        stages,
        y="Method",
        x="seconds",
        hue="Stage",
        order=labels,
        palette=["#0072B2", "#A6CEE3"],
        errorbar=None,
        ax=left,
    )
    gradients = runs["seconds_gradients"].mean()
    left.axvline(gradients, color="0.3", linestyle="--", linewidth=1.2)
    left.text(gradients, -0.6, f"gradients: {gradients:.2g} s ", ha="right", va="bottom", fontsize=9, color="0.3")
    left.set(xscale="log", xlabel="seconds (log scale)", ylabel="")
    left.legend(loc="lower right", title=None, fontsize=9)
    sns.barplot(memory, y="Method", x="peak", order=labels, color="0.6", errorbar=None, ax=right)
    right.set(xlabel="peak memory beyond the gradients, MiB", ylabel="")
    figure.suptitle(f"{title} (mean of {runs.groupby(['dataset', 'rank', 'seed']).ngroups} runs)", fontsize=12)
    return figure


@shown_once
def detection_curves(curves: pd.DataFrame, title: str) -> Figure:
    """Share of the mislabeled examples found against the share of all examples inspected, most harmful first.

    `curves` has the columns dataset, method, seed, inspected, found. Bands: 95% confidence interval over seeds.
    """
    labels = ordered(curves["method"])
    look = look_of(labels)
    curves = curves.assign(Method=curves["method"].map(label))
    datasets = list(dict.fromkeys(curves["dataset"]))
    figure, axes = row_of(datasets, width=3.4, height=3.9, legend=1.4)
    for axis, dataset in zip(axes, datasets, strict=True):
        some = curves[curves["dataset"] == dataset]
        axis.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1)
        sns.lineplot(
            some,
            x="inspected",
            y="found",
            hue="Method",
            hue_order=labels,
            palette=look["palette"],
            style="Method",
            style_order=labels,
            errorbar=confidence_interval,
            err_kws={"alpha": 0.12},
            ax=axis,
        )
        axis.set(
            title=dataset,
            xlabel="share of examples inspected",
            ylabel="share of mislabeled found",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
    legend_beside(figure, axes)
    figure.suptitle(title, fontsize=12)
    return figure


@shown_once
def against_exact(scores: pd.DataFrame, title: str) -> Figure:
    """Each method's scores against the exact ones, one panel per method, standardized so that panels compare.

    `scores` has one column per method, "exact" among them, and a row per training example, and may have a bool
    column "flipped" that marks mislabeled ones.
    """
    methods = [method for method in METHOD_STYLE if method in scores and method != "exact"]
    methods += [method for method in scores if method not in LABELS and method != "flipped"]
    standard = scores.drop(columns="flipped", errors="ignore")
    standard = (standard - standard.mean()) / standard.std()
    flipped = scores.get("flipped", pd.Series(False, index=scores.index)).to_numpy()
    figure, axes = grid_of(methods, width=3.3, height=3.2, columns=3, sharex=True)
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
def score_distributions(scores: pd.DataFrame, title: str) -> Figure:
    """The scores of clean and of mislabeled examples side by side, one panel per method.

    `scores` has a column per method and the bool column "flipped"; positive scores are harmful.
    """
    methods = [method for method in METHOD_STYLE if method in scores]
    figure, axes = grid_of(methods, width=2.6, height=2.8, columns=4, sharey=True)
    names = scores["flipped"].map({False: "clean", True: "mislabeled"})
    for axis, method in zip(axes, methods, strict=True):
        sns.stripplot(
            x=names,
            y=scores[method] / scores[method].abs().max(),
            hue=names,
            order=list(GROUP_COLOURS),
            palette=GROUP_COLOURS,
            size=2.5,
            alpha=0.6,
            jitter=0.3,
            legend=False,
            ax=axis,
        )
        axis.axhline(0, color="0.3", linewidth=1)
        axis.set(title=label(method), xlabel="", ylabel="")
    figure.supylabel("score / largest |score|  (> 0: harmful)", fontsize=11)
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
