"""The study's look: the same colour, marker and name for a method in every figure."""

from collections.abc import Callable, Sequence
from functools import wraps

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

# Label, colour (of the colour-blind-safe Okabe-Ito set, ordered so that lightness differs too) and marker.
BASELINES = {
    "gradient_cosine": ("Gradient cosine", "#0072B2", "*"),
    "hidden_states": ("Hidden states", "#00735A", "8"),
    "bm25": ("BM25", "#8F8F8F", "$B$"),
    "tfidf": ("TF-IDF", "#ADADAD", "$T$"),
    "latents": ("Latents", "#4DB893", "$L$"),
    "training_loss": ("Training loss", "#8C6D31", "$l$"),
    "self_influence": ("Self-influence", "#B5A14F", "$S$"),
    "cleanlab": ("cleanlab", "#7B4173", "$c$"),
    "cleanlab_cross_validated": ("cleanlab, cross-validated", "#CE6DBD", "$C$"),
    "random": ("Random", "#C8C8C8", "$?$"),
    "oracle": ("the flipped ones exactly", "#2FA84F", "$+$"),
    "prompt_similarity": ("Prompt similarity", "#999999", "X"),
    "picture_similarity": ("Picture similarity", "#009E73", "P"),
}
"""What a method is held against; see `evaluation.baselines`. The oracle knows the truth."""

METHOD_STYLE = {
    "hessian_free": ("Hessian-free", "#56B4E9", "s"),
    "lissa": ("LiSSA", "#E69F00", "^"),
    "lissa_as_published": ("LiSSA, as published", "#F0E442", "v"),
    "lissa_scaled": ("LiSSA, scaled", "#CC79A7", "<"),
    "lissa_scaled(100)": ("LiSSA, scaled (100)", "#7A4069", ">"),
    "datainf": ("DataInf", "#D55E00", "o"),
    "datainf+ranks": ("DataInf, ranks of layers", "#F2A27A", "$o$"),
    "exact": ("Exact", "#000000", "D"),
    "exact@1": ("Exact, damping 1", "#3A3A3A", "d"),
    "exact@10": ("Exact, damping 10", "#5A5A5A", "H"),
    "exact@training": ("Exact, damping of the training", "#1B1B6F", "$E$"),
    "kronecker": ("Kronecker", "#117733", "$K$"),
    "kronecker@1": ("Kronecker, damping 1", "#2E8B57", "$k$"),
    "kronecker@training": ("Kronecker, damping of the training", "#0B4F2A", "$t$"),
    "ekfac": ("EK-FAC", "#882255", "$e$"),
    "ekfac@1": ("EK-FAC, damping 1", "#A63D73", "$a$"),
    "joint": ("Joint", "#AA4499", "$J$"),
    "joint@1": ("Joint, damping 1", "#C06BB4", "$j$"),
    "unrolled": ("Unrolled", "#332288", "$U$"),
    "generalized_fisher@training": ("Generalized Fisher, damping of the training", "#88CCEE", "$g$"),
    "generalized_fisher": ("Generalized Fisher", "#44AA99", "$F$"),
    "generalized_fisher@1": ("Generalized Fisher, damping 1", "#6FC2B4", "$f$"),
    "exact_by_inversion": ("Exact, by inversion", "#6F6F6F", "h"),
    "lissa_forming_H": ("LiSSA, H formed", "#A66F00", "p"),
    **BASELINES,
}
LABELS = {method: label for method, (label, _, _) in METHOD_STYLE.items()}
GROUP_COLOURS = {"clean": "#0072B2", "mislabeled": "#D55E00"}
STAGES = {"seconds_gradients": "gradients", "seconds_ihvp": "ihvp", "seconds_scores": "scores"}


def use_style() -> None:
    """The study's look: a light grid, no box, text that reads at the size it is shown."""
    sns.set_theme(context="notebook", style="whitegrid", rc={"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 150, "savefig.bbox": "tight", "axes.titlesize": 12})


def label(method: str) -> str:
    """A method's name as readers know it, with its damping and what else is said of it: "exact@3, recorded"."""
    if method in LABELS:
        return LABELS[method]
    name, comma, note = method.partition(", ")
    name, at, damping = name.partition("@") if not comma else (label(name), "", "")
    return f"{name}, {note}" if comma else f"{label(name)}, damping {damping}" if at else method


def shown_once(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Close the figure for pyplot, so that a notebook shows it as the cell's value and not a second time."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        figure = draw(*args, **kwargs)
        plt.close(figure)
        return figure

    return drawn


def ordered(methods: Sequence[str]) -> list[str]:
    """The methods that occur, in the order and by the labels of `METHOD_STYLE`."""
    present = set(methods)
    return [LABELS[method] for method in METHOD_STYLE if method in present] + sorted(present - LABELS.keys())


def without_repeats(runs: pd.DataFrame, metric: str, least: float = 0.01) -> pd.DataFrame:
    """The runs without LiSSA as published, where it is nowhere further than `least` from LiSSA and could not be seen.

    Args:
        runs: the column method, the metric, and columns that say of what it is.
    """
    both = [runs.loc[runs["method"] == method, metric].to_numpy() for method in ("lissa", "lissa_as_published")]
    if len(both[0]) == len(both[1]) > 0 and np.nanmax(np.abs(both[0] - both[1]), initial=0) < least:
        return runs[runs["method"] != "lissa_as_published"]
    return runs


def look_of(labels: Sequence[str]) -> dict:
    """seaborn's arguments that give each label its colour and marker."""
    styles = {name: (colour, marker) for name, colour, marker in METHOD_STYLE.values()}
    known = [styles.get(name, ("#888888", "P")) for name in labels]
    return {"hue_order": labels, "palette": [c for c, _ in known], "markers": [m for _, m in known]}


def grid_of(panels: Sequence, *, width: float, height: float, columns: int, **sharing) -> tuple[Figure, list]:
    """A figure with one axis for each panel, at most so many side by side."""
    columns = min(columns, len(panels))
    rows = int(np.ceil(len(panels) / columns))
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **sharing)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return figure, list(axes.flat[: len(panels)])


def row_of(panels: Sequence, *, width: float, height: float, legend: float) -> tuple[Figure, list]:
    """Panels side by side that share their y-axis, with room for a legend on the right."""
    size = (max(6.5, width * len(panels) + legend), height)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    return figure, list(axes[0])


def legend_beside(figure: Figure, axes: Sequence) -> None:
    """One legend, right of the panels, for what all of them show."""
    for axis in axes:
        if axis.get_legend() is not None:
            axis.get_legend().remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
