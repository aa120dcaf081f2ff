"""Figures of the benchmarks: what each stage takes, library beside library."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from datainf.plotting.style import label, shown_once

# Stage -> how it is named and coloured (Okabe-Ito again).
STAGES = {
    "forward and backward": ("forward and backward", "0.45"),
    "gradients": ("gradients", "0.75"),
    "cache": ("gradients", "0.75"),
    "factors": ("factors of H, with gradients", "#CC79A7"),
    "ihvp": ("inverse-Hessian-vector products", "#D55E00"),
    "scores": ("scores", "#0072B2"),
    "scores and gradients": ("scores, with gradients again", "#56B4E9"),
}


@shown_once
def side_by_side(record: pd.DataFrame, title: str) -> Figure:
    """Stacked bars: a bar for each way to the scores, a piece for each stage, in units of the training step.

    Args:
        record: of ``benchmarks/side_by_side.py``.
    """
    stages = record[record["stage"] != "total"].copy()
    # Where the scores are not apart from gradients, they are another stage.
    names = stages["library"] + " " + stages["method"].fillna("")
    has_gradients = names.isin(names[stages["stage"].isin(["gradients", "forward and backward"])])
    stages.loc[(stages["stage"] == "scores") & ~has_gradients, "stage"] = "scores and gradients"
    ways = list(dict.fromkeys(zip(stages["library"], stages["method"].fillna(""), strict=True)))
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(ways) + 1.6), layout="constrained")
    named = set()
    for row, (library, method) in enumerate(ways):
        own = stages[(stages["library"] == library) & (stages["method"].fillna("") == method)]
        left = 0.0
        for stage, width in zip(own["stage"], own["ratio_to_training_step"], strict=True):
            text, colour = STAGES[stage]
            axis.barh(row, width, left=left, color=colour, label=None if text in named else text)
            named.add(text)
            left += width
        axis.annotate(f"{left:.2f}", (left, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.axvline(1, color="0.3", linewidth=1, linestyle=":")
    axis.set_yticks(
        range(len(ways)), [f"{library}: {label(method)}" if method else library for library, method in ways]
    )
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set(title=title, xlabel="time, in forward and backward passes of a training step over the same texts")
    axis.grid(axis="y", visible=False)
    axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
