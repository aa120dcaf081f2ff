"""How good are scores: at ranking mislabeled examples first, and at agreeing with the exact influence."""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats
from sklearn.metrics import roc_auc_score


def detection_auc(scores: Float[np.ndarray, " n"], flipped: Bool[np.ndarray, " n"]) -> float:
    """Area under the ROC curve of "mislabeled" against the influence score (paper section 4.2).

    0.5 is chance, 1 ranks every mislabeled example above every clean one. NaN where a score is not a number.
    """
    return float(roc_auc_score(flipped, scores)) if np.isfinite(scores).all() else float("nan")


def detection_curve(scores: Float[np.ndarray, " n"], flipped: Bool[np.ndarray, " n"], points: int = 21) -> pd.DataFrame:
    """Columns ``inspected`` and ``found``: shares of all examples looked at, most harmful first, and of the
    mislabeled ones among them, at `points` evenly spaced shares from 0 to 1."""
    found = np.concatenate([[0], np.cumsum(flipped[np.argsort(-scores, kind="stable")])]) / flipped.sum()
    inspected = np.linspace(0, 1, points)
    return pd.DataFrame(
        {"inspected": inspected, "found": np.interp(inspected * len(flipped), range(len(found)), found)}
    )


def correlation(scores: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Pearson (linear) and Spearman (rank) correlation with the exact influence (paper section 4.1); NaN where a
    score is not a number or all scores are equal."""
    if not np.isfinite(scores).all() or np.ptp(scores) == 0:
        return {"pearson": float("nan"), "spearman": float("nan")}
    return {
        "pearson": float(stats.pearsonr(scores, exact).statistic),
        "spearman": float(stats.spearmanr(scores, exact).statistic),
    }


def found_columns(curve: pd.DataFrame) -> pd.Series:
    """A detection curve as columns of a record: "found_05" is the share found after inspecting 5%."""
    return pd.Series(curve["found"].to_numpy(), index=[f"found_{round(100 * x):02d}" for x in curve["inspected"]])


def curves_from(records: pd.DataFrame) -> pd.DataFrame:
    """The inverse of `found_columns`: one row per record and point, with columns ``inspected`` and ``found``."""
    columns = {name: int(name.removeprefix("found_")) / 100 for name in records if name.startswith("found_")}
    curves = records.melt(["dataset", "method", "rank", "seed"], list(columns), "inspected", "found")
    return curves.assign(inspected=curves["inspected"].map(columns)).dropna(subset="found")
