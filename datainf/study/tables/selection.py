"""What the records of notebook 75 say of data selection."""

import numpy as np
import pandas as pd

from datainf.evaluation.paired import confidence_interval
from datainf.study.plotting import SELECTIONS, label

CELL = ["dataset", "rank", "noise", "design", "method", "share"]


def gains(selections: pd.DataFrame) -> pd.DataFrame:
    """What each choice gains over all data: mean over seeds, and a 95% interval of the difference, which is of two
    models of one seed and the same unseen examples; a row per dataset, rank, noise, design, method and share."""
    tried = selections[selections["design"] != "full"]
    tried = tried.assign(
        share=tried["share"].round(2)
    )  # the oracle's is what was flipped, not quite the same each time
    found = tried.groupby(CELL, sort=False).size().rename("seeds").to_frame()
    for measure in ("accuracy", "loss"):
        of_each = tried.groupby(CELL, sort=False)[f"{measure}_gain"]
        limits = np.array([confidence_interval(values) for _, values in of_each])
        found[f"{measure}_gain"] = of_each.mean()
        found[[f"{measure}_low", f"{measure}_high"]] = limits
    return found.reset_index()


def data_selection(found: pd.DataFrame) -> pd.DataFrame:
    """`gains` of accuracy as a table, in points with the interval: a column per share of the data left as it is."""

    def said(row: pd.Series) -> str:
        gain, low, high = 100 * row[["accuracy_gain", "accuracy_low", "accuracy_high"]].astype(float)
        return f"{gain:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if np.isfinite(low) else "")

    rows = found.assign(
        cell=found.apply(said, axis=1),
        action=found["design"].map(SELECTIONS),
        left=found["share"].map("{:.0%}".format),
        **{"method": found["method"].map(label)},
    )
    index = ["dataset", "rank", "noise", "action", "method"]
    table = rows.pivot(index=index, columns="left", values="cell")
    return table.loc[list(dict.fromkeys(rows[index].itertuples(index=False, name=None))), sorted(table.columns)].fillna(
        ""
    )


def group_agreement(selections: pd.DataFrame) -> pd.DataFrame:
    """Of tasks whose examples come in classes: the rank correlation, over all pairs of classes, of what leaving one out
    does to another's queries with what the scores predict; mean over seeds, a column per method."""
    some = selections.dropna(subset="groups_agreement").drop_duplicates(["dataset", "rank", "seed", "method"])
    table = some.pivot_table("groups_agreement", ["dataset", "rank"], "method", sort=False)
    return table.rename(columns=label).rename_axis(columns=None).round(2)
