"""How good are scores: at ranking mislabeled examples first, at agreeing with the exact influence, and at finding the
training examples of a query's own class."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor


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


def class_detection(
    scores: Float[np.ndarray, "m n"], train_classes: Sequence[str], query_classes: Sequence[str]
) -> pd.DataFrame:
    """Does each query rank the training examples of its own class first (paper section 4.3)?

    Args:
        scores: larger for the training examples that should come first: the absolute influence scores, as in the
            paper's text, or the negated ones (most helpful first), as in its published notebooks.

    Returns:
        One row per query. ``auc``: area under the ROC curve of "same class" against the score, 0.5 being chance.
        ``recall``: the share of its class among the top s training examples, s being the size of that class. Both
        NaN where a score is not a number.
    """
    train_classes, query_classes = np.asarray(train_classes), np.asarray(query_classes)
    found = pd.DataFrame(np.nan, index=range(len(scores)), columns=["auc", "recall"])
    for name in np.unique(query_classes):
        same, queries = train_classes == name, query_classes == name
        rows = scores[queries]
        top = np.argsort(-rows, axis=1, kind="stable")[:, : same.sum()]
        found.loc[queries, "auc"] = _auc(rows[:, same], rows[:, ~same])
        found.loc[queries, "recall"] = same[top].mean(axis=1)
    found[~np.isfinite(scores).all(axis=1)] = np.nan
    return found


def class_detection_table(
    scores: Mapping[tuple[str, str], Float[np.ndarray, "m n"]],
    similarities: Mapping[tuple[str, str], Float[np.ndarray, "m n"]],
    **classes: Sequence[str],
) -> pd.DataFrame:
    """`class_detection` of every (loss, method), mean and standard error over the queries.

    Args:
        scores: influence scores. auc and recall are by their absolute values, auc_signed and recall_signed by
            helpfulness, the negated score.
        similarities: references without influence, the larger the more alike, ranked as they are in both.
        classes: train_classes and query_classes, as for `class_detection`.

    Returns:
        A row per (loss, method): auc, recall, auc_signed, recall_signed, each also with ``_se``.
    """
    ranked = {key: (np.abs(S), -S) for key, S in scores.items()} | {key: (S, S) for key, S in similarities.items()}
    table = {}
    for key, (absolute, helpful) in ranked.items():
        signed = class_detection(helpful, **classes).add_suffix("_signed")
        table[key] = mean_and_error(pd.concat([class_detection(absolute, **classes), signed], axis=1))
    return pd.DataFrame(table).T.rename_axis(["loss", "method"])


def preference(
    scores: Float[np.ndarray, "m n"], train_classes: Sequence[str], one: Sequence[str], other: Sequence[str]
) -> pd.Series:
    """Does each query rank the training examples of one class above those of another?

    Args:
        scores: as for `class_detection`.
        one, other: two classes for each query.

    Returns:
        The chance that a random training example of the class `one` is above a random one of the class `other`: 1 if
        all are, 0.5 where neither is preferred. NaN where a score is not a number.
    """
    train_classes = np.asarray(train_classes)
    pairs = zip(scores, one, other, strict=True)
    preferred = [_auc(row[None, train_classes == a], row[None, train_classes == b])[0] for row, a, b in pairs]
    return pd.Series(preferred).where(np.isfinite(scores).all(axis=1))


def _auc(positive: Float[np.ndarray, "m p"], negative: Float[np.ndarray, "m q"]) -> Float[np.ndarray, " m"]:
    """The Mann-Whitney statistic, the number of pairs in the right order, as a share of all pairs; ties by half."""
    in_order = stats.mannwhitneyu(positive, negative, axis=1, method="asymptotic").statistic
    return in_order / (positive.shape[1] * negative.shape[1])


def mean_and_error(values: pd.DataFrame) -> dict[str, float]:
    """The mean of every column over the queries and, under the name with ``_se``, its standard error."""
    return {**values.mean(), **values.sem().add_suffix("_se")}


def class_shares(
    scores: Float[np.ndarray, "m n"], train_classes: Sequence[str], query_classes: Sequence[str], order: Sequence[str]
) -> pd.DataFrame:
    """How a query class's influence is spread over the training classes: a row per query class, summing to 1.

    A cell is the mean |score| of the training examples of one class for the queries of another, over the sum of its
    row; with k classes 1 / k is an even spread. Rows and columns are in the given order of the classes.
    """
    pairs = pd.DataFrame(np.abs(scores), index=list(query_classes), columns=list(train_classes))
    means = pairs.groupby(level=0).mean().T.groupby(level=0).mean().T.loc[list(order), list(order)]
    return means.div(means.sum(axis=1), axis=0)


def share_in_mean(G: Mapping[str, Float[Tensor, "n d"]]) -> float:
    """How much of the gradients they have in common: sum_l ||mean_i g_li||^2 / sum_l mean_i ||g_li||^2.

    Args:
        G: for each layer a row for every example.

    Returns:
        1 where all are the same, about 1 / n where they point anywhere.
    """
    layers = [G[name] for name in G]
    return float(sum(g.mean(0).square().sum() for g in layers) / sum(g.square().sum(1).mean() for g in layers))


def picture_similarity(
    train: Float[np.ndarray, "n ..."], query: Float[np.ndarray, "m ..."]
) -> Float[np.ndarray, "m n"]:
    """Cosine similarity of pictures' latents, centred on the training pictures' mean: what looking alone achieves."""
    mean = train.mean(axis=0)
    return cosine_similarity((query - mean).reshape(len(query), -1), (train - mean).reshape(len(train), -1))


def prompt_similarity(train_prompts: Sequence[str], query_prompts: Sequence[str]) -> Float[np.ndarray, "m n"]:
    """Cosine similarity of the prompts' TF-IDF word counts: what reading the templates alone achieves."""
    vectorizer = TfidfVectorizer(token_pattern=r"\S+").fit(train_prompts)
    return (vectorizer.transform(query_prompts) @ vectorizer.transform(train_prompts).T).toarray()
