"""The study's tables: what the paper reports beside what was measured here."""

from collections.abc import Iterable

import pandas as pd

from datainf.plotting import confidence_interval, label

TOLERANCE = 0.01  # of an AUC: differences below it count as "about as well"


def mean_and_interval(values: pd.Series) -> str:
    """A mean and half the width of its 95% confidence interval, such as "0.64 ± 0.03"."""
    low, high = confidence_interval(values)
    mean = values.mean()
    return f"{mean:.2f}" if pd.isna(low) else f"{mean:.2f} ± {(high - low) / 2:.2f}"


def by_dataset_and_rank(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A metric's mean and 95% interval over seeds: a row per dataset and rank, a column per method."""
    cells = runs.groupby(["dataset", "rank", "method"], sort=False)[metric].apply(mean_and_interval)
    return cells.unstack("method").rename(columns=label)


def fine_tuned(runs: pd.DataFrame) -> pd.DataFrame:
    """Validation accuracy by dataset and rank beside the majority class's, means over seeds, and n."""
    models = runs.drop_duplicates(["dataset", "rank", "seed"])
    table = models.groupby(["dataset", "rank"], sort=False).agg(
        n=("n_train", "max"),
        seeds=("seed", "nunique"),
        accuracy=("accuracy", mean_and_interval),
        majority=("majority", "mean"),
        beats_majority=("accuracy", lambda a: f"{(a > models.loc[a.index, 'majority']).sum()} of {len(a)}"),
    )
    return table.rename(columns={"beats_majority": "runs above majority"}).round(2)


def ours_beside_paper(errors: pd.DataFrame, detection: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """The paper's numbers and claims, one a row, with what the records of this scale say.

    Args:
        errors, detection: records of the approximation-error and the mislabeled-detection runs.
        reported: `results.paper_reported`.

    Returns:
        Columns item, claim, paper, ours. A claim about an order of methods is counted over cells, a cell being the
        mean over seeds of one dataset and rank.
    """
    correlation = _cells(errors, "pearson")
    auc = _cells(detection, "auc")
    seconds = detection.assign(s=detection["seconds_ihvp"] + detection["seconds_scores"])
    seconds = _cells(seconds, "s")
    paper = reported.set_index(["item", "dataset", "rank", "method", "metric"])["value"]
    lowest = correlation.index.get_level_values("rank") == correlation.index.get_level_values("rank").min()
    rows = [
        (
            "Figure 1",
            f"Pearson correlation with Exact at the lowest rank, {label(method)}",
            f"{paper['Figure 1', 'mrpc', 1, method, 'pearson']:.2f} (MRPC)",
            _per_dataset(correlation.loc[lowest, method]),
        )
        for method in ("datainf", "hessian_free", "lissa")
    ]
    rows += [
        (
            "Figure 1",
            "DataInf correlates more than Hessian-free",
            "always",
            _count(correlation, "datainf", "hessian_free"),
        ),
        ("Figure 1", "DataInf correlates more than LiSSA (10)", "always", _count(correlation, "datainf", "lissa")),
        (
            "Figure 1",
            "DataInf's correlation is lower at the highest rank than at the lowest",
            "generally",
            _falls_with_rank(correlation["datainf"]),
        ),
        (
            "not in the paper",
            "scaled LiSSA (10) correlates more than DataInf",
            "",
            _count(correlation, "lissa_scaled", "datainf"),
        ),
        (
            "Figures 2, 5",
            "DataInf detects better than Hessian-free (AUC)",
            "always",
            _count(auc, "datainf", "hessian_free"),
        ),
        ("Figures 2, 5", "DataInf detects better than LiSSA (10)", "always", _count(auc, "datainf", "lissa")),
        (
            "Figures 2, 5",
            "DataInf detects about as well as Exact, or better",
            "always",
            _count(auc, "datainf", "exact", TOLERANCE),
        ),
        *(
            (
                "Figure 2",
                f"seconds of {label(method)} over seconds of DataInf (ihvp and scores)",
                f"{paper['Figure 2', 'mean of four', 4, method, 'times_datainf']:g}",
                f"{(seconds[method] / seconds['datainf']).median():.1f} (median)",
            )
            for method in ("lissa", "exact")
        ),
    ]
    return pd.DataFrame(rows, columns=["item", "claim", "paper", "ours"])


def _cells(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Means over seeds: a row per (dataset, rank), a column per method."""
    return runs.pivot_table(metric, ["dataset", "rank"], "method", aggfunc="mean", sort=False, dropna=False)


def _count(cells: pd.DataFrame, better: str, worse: str, tolerance: float = 0.0) -> str:
    """In how many cells one method's mean is above another's (less a tolerance)."""
    above = cells[better] > cells[worse] - tolerance
    return f"{above.sum()} of {len(above)}"


def _falls_with_rank(correlation: pd.Series) -> str:
    """In how many datasets the highest rank's mean is below the lowest rank's."""
    by_rank = correlation.unstack("rank")
    falls = by_rank[by_rank.columns.max()] < by_rank[by_rank.columns.min()]
    return f"{falls.sum()} of {len(falls)} datasets"


def _per_dataset(values: pd.Series) -> str:
    return ", ".join(f"{value:.2f} ({dataset})" for (dataset, _), value in values.items())


def to_markdown(table: pd.DataFrame, columns: Iterable[str] | None = None) -> str:
    """A table in GitHub's Markdown."""
    table = table if columns is None else table[list(columns)]
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
