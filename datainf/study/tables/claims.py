"""The paper's numbers and claims, one a row, with what the records of a scale say."""

import numpy as np
import pandas as pd

from datainf.evaluation import paired
from datainf.study.plotting import label
from datainf.study.tables.summaries import LOSSES, kind_of

AS_WELL = 0.01  # of an AUC: by less than that a method may be below another and do about as well
AS_ACCURATE = 0.02  # of an accuracy, likewise

Claim = tuple[str, str, str, str, str, str]
"""Item, claim, the paper's, ours, and of a claim about an order its verdict and the difference that would be seen."""

COLUMNS = ["item", "claim", "paper", "ours", "verdict", "would be seen"]
NO_ORDER = ("", "")


def ours_beside_paper(
    errors: pd.DataFrame,
    detection: pd.DataFrame,
    identification: pd.DataFrame,
    pictures: pd.DataFrame,
    reported: pd.DataFrame,
    truth: pd.DataFrame | None = None,
    selections: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The paper's numbers and claims, one a row, with what the records of this scale say.

    Args:
        errors, detection, identification, pictures: records of the approximation-error, the mislabeled-detection and
            the text and image identification runs.
        reported: `results.paper_reported`.
        truth, selections: records of the ground truth and of data selection, where there are any.

    Returns:
        Columns item, claim, paper, ours, verdict, would be seen. A claim about an order of methods is counted over
        cells, a cell being one dataset and rank; how many of those are resolved, for it or against it, and the mean
        difference over all of them, is said by 95% intervals over seeds (see `evaluation.paired`). The verdict is that
        of the mean; a mean difference as large as the last column says would have been resolved with a probability of
        0.8.
    """
    records = dict(zip(_ROWS, (errors, detection, identification, pictures, truth, selections), strict=True))
    there = {name: some for name, some in records.items() if some is not None and len(some)}
    return pd.concat([claims_of(name, some, reported) for name, some in there.items()], ignore_index=True)


def claims_of(experiment: str, records: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """The part of `ours_beside_paper` that is of one experiment, from its records."""
    paper = reported.set_index(["item", "dataset", "rank", "method", "metric"])["value"]
    rows = [row for rows_of in _ROWS.get(experiment, ()) for row in rows_of(records, paper)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _approximation_rows(errors: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """Correlation with the exact influence."""
    correlation = _cells(errors, "pearson")
    lowest = correlation.index.get_level_values("rank") == correlation.index.get_level_values("rank").min()
    at_lowest_rank = [
        (
            "Figure 1",
            f"Pearson correlation with Exact at the lowest rank, {label(method)}",
            f"{paper['Figure 1', 'mrpc', 1, method, 'pearson']:.2f} (MRPC)",
            _per_dataset(correlation.loc[lowest, method]),
            *NO_ORDER,
        )
        for method in ("datainf", "hessian_free", "lissa")
        if method in correlation
    ]
    orders = {
        ("datainf", "hessian_free"): "always",
        ("datainf", "lissa"): "always",
        ("hessian_free", "lissa"): "observed",
        ("lissa_scaled", "datainf"): "",
    }
    rows = []
    for metric in ("pearson", "spearman"):  # of which the paper has the first
        for (one, other), said in orders.items():
            claim = f"{_NAMES[one]} correlates more than {_NAMES[other]} ({metric.capitalize()})"
            said = said if metric == "pearson" else ""
            item = "Figure 1" if said else "not in the paper"
            rows += _order((item, claim, said), errors, metric, one, other)
    if errors["rank"].nunique() < 2:
        return at_lowest_rank + rows
    datainf = errors[errors["method"] == "datainf"]
    falls = "DataInf's correlation is higher at the lowest rank than at the highest"
    learns = f"the lowest rank learns as well as the highest (accuracy, less {AS_ACCURATE})"
    return at_lowest_rank + [
        *rows,
        ("Figure 1", falls, "generally", *_said(_of_ranks(datainf, "pearson"))),
        ("footnote 3", learns, "similar", *_said(_of_ranks(datainf, "accuracy"), least=-AS_ACCURATE)),
    ]


def _mislabeled_rows(detection: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """Detection of mislabeled examples, and its cost."""
    seconds = _cells(detection.assign(s=detection["seconds_ihvp"] + detection["seconds_scores"]), "s")
    of = ("Figures 2, 5", "always")
    orders = [
        (of, f"DataInf detects better than {_NAMES[other]} (AUC)", other, 0.0) for other in ("hessian_free", "lissa")
    ]
    orders.append((of, f"DataInf detects about as well as Exact, or better (AUC, less {AS_WELL})", "exact", -AS_WELL))
    costs = [
        (
            "Figure 2",
            f"seconds of {label(method)} over seconds of DataInf (ihvp and scores)",
            f"{paper['Figure 2', 'mean of four', 4, method, 'times_datainf']:g}",
            f"{(seconds[method] / seconds['datainf']).median():.1f} (median)",
            *NO_ORDER,
        )
        for method in ("lissa", "exact")
        if {method, "datainf"} <= set(seconds)
    ]
    beyond = [
        (("not in the paper", ""), f"DataInf detects better than {label(baseline)} (AUC)", baseline, 0.0)
        for baseline in ("training_loss", "self_influence", "cleanlab", "cleanlab_cross_validated")
    ]

    def judged(rows: list) -> list[Claim]:
        return [
            row
            for (item, said), claim, other, least in rows
            for row in _order((item, claim, said), detection, "auc", "datainf", other, least=least)
        ]

    return judged(orders) + costs + judged(beyond)


def _class_detection_rows(identification: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """Class detection by |score|, one mean over seeds for each task."""
    rows = []
    for loss, of in LOSSES.items():
        runs = identification[identification["loss"] == loss]
        if runs.empty:
            continue
        for metric, name in (("auc", "AUC"), ("recall", "recall")):
            means = _cells(runs, metric)
            reported = {
                method: _in_paper(identification, paper, "Table 2", method, metric)
                for method in ("hessian_free", "datainf")
            }
            rows += [
                (
                    "Table 2" if method in reported else "not in the paper",
                    f"class-detection {name} of {label(method)}, gradients of {of}",
                    reported.get(method, ""),
                    _per_dataset(means[method]),
                    *NO_ORDER,
                )
                for method in ("hessian_free", "datainf", "lissa", "lissa_scaled", "exact")
                if method in means and (metric == "auc" or method in reported)
            ]
            above = f"DataInf's {name} is above Hessian-free's, gradients of {of}"
            rows += _order(("Table 2", above, "always"), runs, metric, "datainf", "hessian_free")
        better = f"LiSSA with a step size detects better than Hessian-free (AUC), gradients of {of}"
        rows += _order(("section 4.3", better, "no: it collapses"), runs, "auc", "lissa_scaled", "hessian_free")
    similarities = {
        "prompt_similarity": "comparing the words of the prompts (TF-IDF)",
        "picture_similarity": "comparing the latents of the pictures (cosine)",
    }
    main = _cells(identification[identification["loss"] == identification["loss"].iloc[0]], "auc")
    return rows + [
        ("not in the paper", f"class-detection AUC of {what}", "", _per_dataset(main[method]), *NO_ORDER)
        for method, what in similarities.items()
        if method in main
    ]


def _text_rows(identification: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """Exchanged responses, and what the language models learned."""
    completion = identification.query("loss == 'completion' and method == 'datainf'")
    columns = ["prompt_preferred", "prompt_preferred_signed", "accuracy_base", "accuracy"]
    means = completion.groupby(["dataset", "rank"], sort=False)[columns].mean()
    return [
        (
            "not in the paper",
            f"responses exchanged: how often DataInf puts the prompt's class above the response's, by {how}",
            "",
            _per_dataset(means[column]),
            *NO_ORDER,
        )
        for how, column in (("|score|", "prompt_preferred"), ("helpfulness", "prompt_preferred_signed"))
    ] + [
        (
            "Table 4",
            f"accuracy of the {name} model",
            _in_paper(identification, paper, "Table 4", method, "accuracy"),
            _per_dataset(means[column]),
            *NO_ORDER,
        )
        for name, method, column in (("base", "base", "accuracy_base"), ("fine-tuned", "fine_tuned", "accuracy"))
    ]


def _picture_rows(pictures: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """What the diffusion models learned."""
    base, tuned = (_in_paper(pictures, paper, "Table 4", method, "fid") for method in ("base", "fine_tuned"))
    means = pictures.groupby(["dataset", "rank"], sort=False)[["frechet_base", "frechet"]].mean()
    features = " and ".join(pictures["frechet_features"].unique())
    return [
        (
            "Table 4",
            f"Fréchet distance after fine-tuning over before (paper: FID; ours: {features})",
            f"{tuned} over {base}",
            _per_dataset(means["frechet"] / means["frechet_base"]),
            *NO_ORDER,
        )
    ]


def _ground_truth_rows(truth: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """How well scores predict retraining, each cell being a task, a rank and a design."""
    cell = ("dataset", "rank", "design")
    lds = truth.pivot_table("lds", list(cell), "method", sort=False)
    fresh = lds[lds.index.get_level_values("design") == "half left out, fresh batches"].droplevel("design")
    orders = (
        ("datainf", "hessian_free"),
        ("datainf", "exact"),
        ("exact@1", "datainf"),
        ("exact@training", "datainf"),
        ("generalized_fisher@1", "datainf"),
        ("exact@training", "exact"),
        ("datainf", "gradient_cosine"),
    )
    rows: list[Claim] = [
        (
            "not in the paper",
            f"LDS of {label(method)}, half left out, fresh batches",
            "",
            _per_dataset(fresh[method].dropna()),
            *NO_ORDER,
        )
        for method in ("hessian_free", "datainf", "exact", "exact@1", "exact@training", "gradient_cosine")
        if method in fresh and fresh[method].notna().any()
    ]
    for better, worse in orders:
        predicts = f"{label(better)} predicts retraining better than {label(worse)} (LDS)"
        rows += _order(("not in the paper", predicts, ""), truth, "lds", better, worse, cell=cell)
    detection = truth.dropna(subset="auc") if "auc" in truth else truth.iloc[:0]
    for better, worse in (
        ("datainf", "hessian_free"),
        ("generalized_fisher@1", "datainf"),
        ("exact@training", "datainf"),
        ("datainf", "training_loss"),
    ):
        detects = f"{label(better)} detects the flips of these tasks better than {label(worse)} (AUC)"
        rows += _order(("not in the paper", detects, ""), detection, "auc", better, worse)
    return rows


def _selection_rows(selections: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """What data selection gains in accuracy, each cell being a task, a rank and a share kept."""
    cell = ("dataset", "rank", "noise", "share")
    kept = selections[selections["design"] == "keep"]
    rows = []
    for method in dict.fromkeys(kept["method"]):
        if method in ("oracle", "random"):
            continue
        item, said = ("ICLR version", "often") if method == "datainf" else ("not in the paper", "")
        over_all = kept[kept["method"] == method].set_index([*cell, "seed"])["accuracy_gain"]
        rows.append((item, f"models are better on what {label(method)} keeps than on all data", said, *_said(over_all)))
        by_chance = f"models are better on what {label(method)} keeps than on as many kept at random"
        rows += _order(("not in the paper", by_chance, ""), kept, "accuracy", method, "random", cell=cell)
    return rows


def _in_paper(identification: pd.DataFrame, paper: pd.Series, item: str, method: str, metric: str) -> str:
    """The paper's numbers for the tasks of these records, at the rank it has them for."""
    of_item = paper.xs((item, method, metric), level=("item", "method", "metric")).droplevel("rank")
    tasks = [kind for kind in dict.fromkeys(kind_of(identification)) if kind in of_item]
    return ", ".join(f"{of_item[kind]:g}" for kind in tasks)


def _cells(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Means over seeds: a row per (dataset, rank), a column per method."""
    table = runs.pivot_table(metric, ["dataset", "rank"], "method", aggfunc="mean", sort=False, dropna=False)
    return table.dropna(how="all")


def _order(
    claim: tuple[str, str, str],
    runs: pd.DataFrame,
    metric: str,
    one: str,
    other: str,
    *,
    least: float = 0.0,
    **cell,
) -> list[Claim]:
    """The row of an item's claim about two methods, as the paper has it: what their paired differences say, the
    verdict, and what would be seen. No row, if there are no runs of both."""
    if not {one, other} <= set(runs["method"]):
        return []
    return [(*claim, *_said(paired.differences(runs, metric, one, other, **cell), least=least))]


def _said(differences: pd.Series, *, least: float = 0.0) -> tuple[str, str, str]:
    found = paired.order(differences, least=least)
    return str(found), found.verdict, "" if np.isnan(found.detectable) else f"{found.detectable:.2g}"


def _of_ranks(runs: pd.DataFrame, metric: str) -> pd.Series:
    """A metric at the lowest rank minus that at the highest, by dataset and seed."""
    by_rank = runs.pivot_table(metric, ["dataset", "seed"], "rank", sort=False)
    return (by_rank[by_rank.columns.min()] - by_rank[by_rank.columns.max()]).dropna()


def _per_dataset(values: pd.Series) -> str:
    """By dataset, and by rank where there are several of one dataset."""
    several = values.index.get_level_values(0).duplicated(keep=False)
    names = [
        f"{dataset}, rank {rank}" if many else dataset
        for (dataset, rank), many in zip(values.index, several, strict=True)
    ]
    return ", ".join(f"{value:.2f} ({name})" for name, value in zip(names, values, strict=True))


_NAMES = {
    "datainf": "DataInf",
    "hessian_free": "Hessian-free",
    "lissa": "LiSSA (10)",
    "lissa_scaled": "scaled LiSSA (10)",
}

_ROWS = {
    "approximation_error": [_approximation_rows],
    "mislabeled_detection": [_mislabeled_rows],
    "text_identification": [_class_detection_rows, _text_rows],
    "image_identification": [_class_detection_rows, _picture_rows],
    "ground_truth": [_ground_truth_rows],
    "data_selection": [_selection_rows],
}
