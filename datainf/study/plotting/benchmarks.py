"""Figures of the benchmarks: what each stage takes, library beside library."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from datainf.study.plotting.style import shown_once

# Stage -> how it is named and coloured. Neighbours in a bar differ in lightness too, so that they do in grey.
STAGES = {
    "forward and backward": ("forward and backward", "0.45"),
    "gradients": ("gradients", "0.82"),
    "cache": ("gradients", "0.82"),
    "factors": ("factors of H, with gradients", "#A04A7C"),
    "ihvp": ("inverse-Hessian-vector products", "#E69F00"),
    "scores": ("scores", "#003F7D"),
    "scores and gradients": ("scores and gradients in one", "#56B4E9"),
}
# What a library's method computes, in the order of drawing -> the methods, as the record has them.
COMPUTED = {
    "": [""],
    "Hessian-free": ["hessian_free", "grad_dot", "identity", "score", "index", "tracin"],
    "DataInf": ["datainf", "datainf, lam of dattri", "datainf, attribute()"],
    "other": ["exact", "ekfac"],
}
DETAILS = {
    "datainf, lam of dattri": ", one damping",
    "datainf, attribute()": ", attribute()",
    "index": ", index on disk",
    "exact": ", Exact",
    "ekfac": ", EK-FAC",
}


@shown_once
def side_by_side(record: pd.DataFrame, title: str) -> Figure:
    """Stacked bars: a bar for each way to the scores, a piece for each stage, in units of one epoch's passes.

    Ways that compute the same stand together. Hatched bars were run on less and scaled up; a bar far longer than the
    others is cut.

    Args:
        record: of ``benchmarks/side_by_side.py``.
    """
    record = record.assign(method=record["method"].fillna(""))
    ways = [
        (computed, library, method)
        for computed, methods in COMPUTED.items()
        for method in methods
        for library in record.loc[record["method"] == method, "library"].unique()
    ]
    totals = record[record["stage"] == "total"].set_index(["library", "method"])["ratio_to_training_step"]
    end = 1.25 * totals.nlargest(2).iloc[-1]
    figure, axis = plt.subplots(figsize=(10, 0.4 * len(ways) + 1.6), layout="constrained")
    named = set()
    for row, (_, library, method) in enumerate(ways):
        own = record[(record["library"] == library) & (record["method"] == method) & (record["stage"] != "total")]
        apart = set(own["stage"]) & {"gradients", "forward and backward"}
        total, pieces = totals[library, method], own["ratio_to_training_step"]
        pieces = pieces * total / pieces.sum()  # medians of stages do not add up to the median of the whole
        left, hatch = 0.0, "//" if "scaled up" in str(own["note"].iloc[0]) else None
        for stage, width in zip(own["stage"], pieces, strict=True):
            # Scores that are not apart from gradients are another stage.
            text, colour = STAGES["scores and gradients" if stage == "scores" and not apart else stage]
            own_label = None if text in named else text
            axis.barh(row, width, left=left, color=colour, hatch=hatch, edgecolor="white", label=own_label)
            named.add(text)
            left += width
        text = f"{total:.2f}" if total < end else f"{total:.1f}, cut here"
        at, side = (total, "left") if total < end else (end, "right")
        axis.annotate(text, (at, row), (4 if total < end else -4, 0), textcoords="offset points", va="center", ha=side)
    axis.axvline(1, color="0.3", linewidth=1, linestyle=":")
    axis.set_xlim(0, end)
    names = [f"{c}: {library}{DETAILS.get(method, '')}" if c else "one epoch's passes" for c, library, method in ways]
    axis.set_yticks(range(len(ways)), names)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="time, in units of one epoch's passes: forward and backward over the same texts")
    axis.grid(axis="y", visible=False)
    axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
