"""What the records of notebook 71 say of damping."""

import pandas as pd


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
