"""The records of notebook 71, and what they say of damping."""

import pandas as pd

COLUMNS = [
    *("design", "method", "base_method", "at_damping", "curvature", "part", "aggregate"),
    *("lds", "low", "high", "lds_of_mean", "lds_of_few", "auc"),
]


def hessian_record(
    by_damping: pd.DataFrame,
    by_rule: pd.DataFrame,
    by_fisher: pd.DataFrame,
    by_part: pd.DataFrame,
    by_unrolling: pd.DataFrame,
) -> pd.DataFrame:
    """One table of what notebook 71 measured, in the columns that results/README.md describes.

    Args:
        by_damping, by_fisher: a row per design, method and ``damping``, of the empirical Fisher and of the true one.
        by_rule: of the damping that follows from the training.
        by_part: of the ``part`` of the layers whose scores are added, "all" and "ranks" among them.
        by_unrolling: of the derivative through the fine-tuning. Any table but the first may be empty.
    """
    by_part, rows = by_part[by_part["part"] != "all"], [_named(by_damping)]
    ranks = by_part["part"] == "ranks"
    rows.append(_of(by_rule, "@training"))
    rows.append(_named(by_fisher, ", true Fisher").assign(curvature="true"))
    rows.append(by_part[~ranks].assign(method=by_part["method"] + ", " + by_part["part"]))
    rows.append(by_part[ranks].assign(method=by_part["method"] + "+ranks", aggregate="ranks", part="all"))
    rows.append(_of(by_unrolling, "unrolled"))
    record = pd.concat([some for some in rows if len(some)], ignore_index=True).reindex(columns=COLUMNS)
    record["base_method"] = record["method"].str.extract(r"^(\w+(?:\(\d+\))?)", expand=False)
    return record.fillna({"curvature": "empirical", "part": "all", "aggregate": "sum"})


def _of(table: pd.DataFrame, ending: str) -> pd.DataFrame:
    """Its rows whose method ends so."""
    return table[table["method"].str.endswith(ending)] if len(table) else table


def _named(table: pd.DataFrame, note: str = "") -> pd.DataFrame:
    """Its rows with a name of the method that says its damping too."""
    if not len(table):
        return table
    return table.assign(
        at_damping=table["damping"], method=table["method"] + "@" + table["damping"].map("{:g}".format) + note
    )


def damping_paths(hessians: pd.DataFrame) -> pd.DataFrame:
    """LDS by damping, mean over seeds: a panel for each dataset and rank, of its last design, in the same batches."""
    some = hessians[hessians["at_damping"].notna() & (hessians["curvature"] == "empirical")]
    last = some.groupby(["dataset", "rank"])["design"].transform("last")
    some = some[some["design"] == last]
    some = some.assign(
        design=some["dataset"] + ", rank " + some["rank"].astype(str) + ": " + some["design"],
        method=some["base_method"],
        damping=some["at_damping"],
    )
    return some.groupby(["design", "method", "damping"], sort=False)["lds"].mean().reset_index()


def dampings(hessians: pd.DataFrame) -> pd.DataFrame:
    """What damping does to Exact, mean over seeds: a row per dataset, rank and design."""
    cell = ["dataset", "rank", "design"]
    by_method = hessians.pivot_table("lds", cell, "method", sort=False)
    plain = hessians[
        (hessians["base_method"] == "exact") & (hessians["curvature"] == "empirical") & hessians["at_damping"].notna()
    ]
    path = plain.pivot_table("lds", cell, "at_damping", sort=False).loc[by_method.index]
    columns = {
        "Hessian-free": by_method.get("hessian_free@0.1"),
        "DataInf": by_method.get("datainf@0.1"),
        "Exact at 0.1": by_method.get("exact@0.1"),
        "Exact at its best": path.max(axis=1),
        "which is at": path.idxmax(axis=1),
        "Exact at the training's": by_method["exact@training"],
    }
    unrolled = hessians[hessians["method"] == "unrolled"]
    if len(unrolled):
        columns["unrolled, mean query"] = unrolled.groupby(cell, sort=False)["lds_of_mean"].mean()
    return pd.DataFrame(columns, index=by_method.index).round(3)
