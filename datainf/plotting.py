"""One function per kind of figure; the same colour, marker and name for a method everywhere."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from scipy import stats

# Label, colour (of the colour-blind-safe Okabe-Ito set, ordered so that lightness differs too) and marker.
METHOD_STYLE = {
    "hessian_free": ("Hessian-free", "#56B4E9", "s"),
    "lissa": ("LiSSA", "#E69F00", "^"),
    "lissa_as_published": ("LiSSA, as published", "#F0E442", "v"),
    "lissa_scaled": ("LiSSA, scaled", "#CC79A7", "<"),
    "lissa_scaled(100)": ("LiSSA, scaled (100)", "#7A4069", ">"),
    "datainf": ("DataInf", "#D55E00", "o"),
    "exact": ("Exact", "#000000", "D"),
    "prompt_similarity": ("Prompt similarity", "#999999", "X"),
}
LABELS = {method: label for method, (label, _, _) in METHOD_STYLE.items()}
GROUP_COLOURS = {"clean": "#0072B2", "mislabeled": "#D55E00"}
STAGES = {"seconds_gradients": "gradients", "seconds_ihvp": "ihvp", "seconds_scores": "scores"}


def use_style() -> None:
    """The study's look: a light grid, no box, text that reads at the size it is shown."""
    sns.set_theme(context="notebook", style="whitegrid", rc={"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 150, "savefig.bbox": "tight", "axes.titlesize": 12})


def label(method: str) -> str:
    """A method's name as readers know it."""
    return LABELS.get(method, method)


def _shown_once(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Close the figure for pyplot, so that a notebook shows it as the cell's value and not a second time."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        figure = draw(*args, **kwargs)
        plt.close(figure)
        return figure

    return drawn


def _order(methods: Sequence[str]) -> list[str]:
    """The methods that occur, in the order and by the labels of `METHOD_STYLE`."""
    present = set(methods)
    return [LABELS[method] for method in METHOD_STYLE if method in present] + sorted(present - LABELS.keys())


def _look(labels: Sequence[str]) -> dict:
    """seaborn's arguments that give each label its colour and marker."""
    styles = {name: (colour, marker) for name, colour, marker in METHOD_STYLE.values()}
    known = [styles.get(name, ("#888888", "P")) for name in labels]
    return {"hue_order": labels, "palette": [c for c, _ in known], "markers": [m for _, m in known]}


def confidence_interval(values: pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of few runs; NaN where there is but one."""
    values = values.dropna()
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    return values.mean() - half, values.mean() + half


def _grid_of(panels: Sequence, *, width: float, height: float, columns: int, **sharing) -> tuple[Figure, list]:
    """A figure with one axis for each panel, at most so many side by side."""
    columns = min(columns, len(panels))
    rows = int(np.ceil(len(panels) / columns))
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **sharing)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return figure, list(axes.flat[: len(panels)])


@_shown_once
def by_rank(runs: pd.DataFrame, metric: str, ylabel: str, title: str, *, reference: float | None = None) -> Figure:
    """Mean and 95% confidence interval of a metric by LoRA rank, one panel per dataset, one line per method.

    The figure of the paper's Figures 1, 2 and 5. `runs` has one row per run and method; `reference` draws a line
    such as chance.
    """
    runs = runs.assign(Method=runs["method"].map(label), Rank=runs["rank"])
    labels = _order(runs["method"])
    datasets = list(dict.fromkeys(runs["dataset"]))
    figure, axes = plt.subplots(
        1,
        len(datasets),
        figsize=(max(6.5, 3.6 * len(datasets) + 1), 3.9),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
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
            **_look(labels),
        )
        if reference is not None:
            axis.axhline(reference, color="0.5", linestyle=":", linewidth=1)
        axis.set(title=dataset, xlabel="LoRA rank", ylabel=ylabel)
        axis.get_legend().remove()
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    seeds, sizes = runs["seed"].nunique(), sorted({runs["n_train"].min(), runs["n_train"].max()})
    n = " to ".join(str(size) for size in sizes)
    how = f"mean of {seeds} seed{'s' * (seeds > 1)}, n = {n} training examples; bars: 95% confidence interval"
    figure.suptitle(f"{title}\n{how}", fontsize=12)
    return figure


@_shown_once
def cost(runs: pd.DataFrame, title: str) -> Figure:
    """Seconds of each stage (left, logarithmic) and peak memory of the influence stages (right), by method.

    The gradients are the same for every method and are drawn as a line to hold the others against.
    """
    labels = _order(runs["method"])
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


@_shown_once
def detection_curves(curves: pd.DataFrame, title: str) -> Figure:
    """Share of the mislabeled examples found against the share of all examples inspected, most harmful first.

    `curves` has the columns dataset, method, seed, inspected, found. Bands: 95% confidence interval over seeds.
    """
    labels = _order(curves["method"])
    look = _look(labels)
    curves = curves.assign(Method=curves["method"].map(label))
    datasets = list(dict.fromkeys(curves["dataset"]))
    figure, axes = plt.subplots(
        1,
        len(datasets),
        figsize=(max(6.5, 3.4 * len(datasets) + 1.4), 3.9),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
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
        axis.get_legend().remove()
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


@_shown_once
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
    figure, axes = _grid_of(methods, width=3.3, height=3.2, columns=3, sharex=True)
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


@_shown_once
def score_distributions(scores: pd.DataFrame, title: str) -> Figure:
    """The scores of clean and of mislabeled examples side by side, one panel per method.

    `scores` has a column per method and the bool column "flipped"; positive scores are harmful.
    """
    methods = [method for method in METHOD_STYLE if method in scores]
    figure, axes = _grid_of(methods, width=2.6, height=2.8, columns=4, sharey=True)
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


@_shown_once
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


@_shown_once
def by_method(
    points: pd.DataFrame, xlabel: str, title: str, *, references: Mapping[str, float], kinds: Mapping[str, str]
) -> Figure:
    """One panel side by side for each of several quantities, one row for each method, one marker for each kind.

    Args:
        points: columns panel, method, kind, value, error (half the length of its bar).
        references: panel -> where a line marks chance.
        kinds: kind -> "full" or "none", how its marker is filled.
    """
    labels = _order(points["method"])
    look = _look(labels)
    panels = list(references)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(max(7.5, 3.4 * len(panels) + 1.2), 0.42 * len(labels) + 1.9),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        some = points[points["panel"] == panel].assign(Method=points["method"].map(label))
        for place, (kind, fill) in enumerate(kinds.items()):
            rows = some[some["kind"] == kind].set_index("Method")
            for y, (name, colour, marker) in enumerate(zip(labels, look["palette"], look["markers"], strict=True)):
                if name in rows.index:
                    axis.errorbar(
                        rows.loc[name, "value"],
                        y + 0.15 * (2 * place - len(kinds) + 1),
                        xerr=rows.loc[name, "error"],
                        color=colour,
                        marker=marker,
                        fillstyle=fill,
                        markersize=7,
                        linewidth=1.3,
                    )
        axis.axvline(references[panel], color="0.5", linestyle=":", linewidth=1)
        axis.set(title=panel, xlim=(-0.03, 1.05), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "", "0.5", "", "1"])
        axis.set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()  # shared by all panels
    figure.supxlabel(xlabel, fontsize=11)
    handles = [
        plt.Line2D([], [], color="0.2", marker="o", fillstyle=fill, linestyle="", label=kind)
        for kind, fill in kinds.items()
    ]
    handles.append(plt.Line2D([], [], color="0.5", linestyle=":", label="chance"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


@_shown_once
def by_loss(points: pd.DataFrame, title: str) -> Figure:
    """Class detection for each loss that the gradients may be of: one panel per quantity or task, one marker per method.

    `points` has the columns panel, method, loss and value; of several values mean and 95% confidence interval.
    """
    labels = _order(points["method"])
    panels = list(dict.fromkeys(points["panel"]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.7 * len(panels) + 1.4, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        sns.pointplot(
            points[points["panel"] == panel].assign(Method=lambda some: some["method"].map(label)),
            x="loss",
            y="value",
            hue="Method",
            errorbar=confidence_interval,
            dodge=0.5,
            linestyle="none",
            markersize=6,
            err_kws={"linewidth": 1.2},
            ax=axis,
            **_look(labels),
        )
        axis.set(title=panel, xlabel="loss whose gradients are compared", ylabel="", ylim=(-0.02, 1.04))
        axis.get_legend().remove()
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


@_shown_once
def class_heat_maps(shares: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Which classes' training examples influence which classes' queries: one panel per method.

    `shares` maps a method to `metrics.class_shares`; every row of a panel sums to 100%.
    """
    highest = max(table.to_numpy().max() for table in shares.values())
    figure, axes = plt.subplots(
        1, len(shares), figsize=(4.6 * len(shares) + 1.6, 5.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (method, table) in zip(axes[0], shares.items(), strict=True):
        sns.heatmap(
            100 * table,
            vmin=0,
            vmax=100 * highest,
            cmap="cividis",
            annot=True,
            fmt=".0f",
            annot_kws={"fontsize": 8},
            square=True,
            cbar=axis is axes[0, -1],
            cbar_kws={"label": "share of the row's mean |score|, %", "shrink": 0.7},
            ax=axis,
        )
        axis.set(title=label(method), xlabel="class of the training examples", ylabel="")
        axis.set_xticks(axis.get_xticks(), axis.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    axes[0, 0].set_ylabel("class of the test examples")
    figure.suptitle(title, fontsize=12)
    return figure


@_shown_once
def completion_curve(history: pd.DataFrame) -> Figure:
    """Loss per token of the responses by epoch, of training and of test examples."""
    figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.plot(history["epoch"], history["loss"], marker="o", color="#0072B2", label="training")
    axis.plot(history["epoch"], history["query_loss"], marker="s", color="#D55E00", label="test")
    axis.set(xlabel="epoch", ylabel="nats per response token", title="Loss of the responses", ylim=(0, None))
    axis.legend(frameon=False)
    return figure
