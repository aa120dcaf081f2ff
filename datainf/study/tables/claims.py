"""The paper's numbers and claims, one a row, with what the records of a scale say."""

import pandas as pd

from datainf.study.plotting import label
from datainf.study.tables.selection import gains
from datainf.study.tables.summaries import LOSSES, kind_of

TOLERANCE = 0.01  # of an AUC: differences below it count as "about as well"

Claim = tuple[str, str, str, str]
"""Item, claim, the paper's, ours."""


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
        Columns item, claim, paper, ours. A claim about an order of methods is counted over cells, a cell being the
        mean over seeds of one dataset and rank.
    """
    records = dict(zip(_ROWS, (errors, detection, identification, pictures, truth, selections), strict=True))
    there = {name: some for name, some in records.items() if some is not None and len(some)}
    return pd.concat([claims_of(name, some, reported) for name, some in there.items()], ignore_index=True)


def claims_of(experiment: str, records: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """The part of `ours_beside_paper` that is of one experiment, from its records."""
    paper = reported.set_index(["item", "dataset", "rank", "method", "metric"])["value"]
    rows = [row for rows_of in _ROWS.get(experiment, ()) for row in rows_of(records, paper)]
    return pd.DataFrame(rows, columns=["item", "claim", "paper", "ours"])


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
        )
        for method in ("datainf", "hessian_free", "lissa")
    ]
    return at_lowest_rank + [
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
    ]


def _mislabeled_rows(detection: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """Detection of mislabeled examples, and its cost."""
    auc = _cells(detection, "auc")
    seconds = _cells(detection.assign(s=detection["seconds_ihvp"] + detection["seconds_scores"]), "s")
    return [
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
        *(
            (
                "not in the paper",
                f"DataInf detects better than {label(baseline)} (AUC)",
                "",
                _count(auc.dropna(subset=baseline), "datainf", baseline),
            )
            for baseline in ("training_loss", "self_influence", "cleanlab", "cleanlab_cross_validated")
            if baseline in auc
        ),
    ]


def _class_detection_rows(identification: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """Class detection by |score|, one mean over seeds for each task."""
    means = identification.pivot_table("auc", ["dataset", "rank"], ["loss", "method"], sort=False)
    rows = []
    for loss, of in LOSSES.items():
        if loss not in means:
            continue
        auc = means[loss]
        rows += [
            (
                "Table 2",
                f"class-detection AUC of {label(method)}, gradients of {of}",
                _in_paper(identification, paper, "Table 2", method, "auc"),
                _per_dataset(auc[method]),
            )
            for method in ("hessian_free", "datainf")
        ]
        rows.append(
            (
                "Table 2",
                f"DataInf's is above Hessian-free's, gradients of {of}",
                "always",
                f"{_count(auc, 'datainf', 'hessian_free')} tasks",
            )
        )
        rows += [
            (
                "not in the paper",
                f"class-detection AUC of {label(method)}, gradients of {of}",
                "",
                _per_dataset(auc[method]),
            )
            for method in ("lissa", "lissa_scaled", "exact")
            if method in auc
        ]
    similarities = {
        "prompt_similarity": "comparing the words of the prompts (TF-IDF)",
        "picture_similarity": "comparing the latents of the pictures (cosine)",
    }
    main = means[next(iter(means))[0]]
    return rows + [
        ("not in the paper", f"class-detection AUC of {what}", "", _per_dataset(main[method]))
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
        )
        for how, column in (("|score|", "prompt_preferred"), ("helpfulness", "prompt_preferred_signed"))
    ] + [
        (
            "Table 4",
            f"accuracy of the {name} model",
            _in_paper(identification, paper, "Table 4", method, "accuracy"),
            _per_dataset(means[column]),
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
        )
    ]


def _ground_truth_rows(truth: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """How well scores predict retraining, each cell being a task, a rank and a design."""
    lds = truth.pivot_table("lds", ["dataset", "rank", "design"], "method", sort=False)
    fresh = lds.xs("half left out, fresh batches", level="design", drop_level=True)
    return [
        (
            "not in the paper",
            f"LDS of {label(method)}, half left out, fresh batches",
            "",
            _per_dataset(fresh[method]),
        )
        for method in ("hessian_free", "datainf", "exact", "exact@10", "gradient_cosine")
        if method in fresh
    ] + [
        (
            "not in the paper",
            f"{label(better)} predicts retraining better than {label(worse)} (LDS)",
            "",
            _count(lds, better, worse),
        )
        for better, worse in (
            ("datainf", "hessian_free"),
            ("datainf", "exact"),
            ("exact@10", "exact"),
            ("exact@10", "datainf"),
            ("datainf", "gradient_cosine"),
        )
        if {better, worse} <= set(lds)
    ]


def _selection_rows(selections: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """What data selection gains, each cell being a task, a rank and a share kept; resolved where the interval of the
    paired differences over seeds excludes 0."""
    found = gains(selections)
    kept = found[(found["design"] == "keep") & (found["method"] != "oracle")]
    rows = []
    for method, some in kept.groupby("method", sort=False):
        better, worse = some["accuracy_low"] > 0, some["accuracy_high"] < 0
        said = f"{better.sum()} better, {worse.sum()} worse, {(~better & ~worse).sum()} not resolved"
        paper_says = "often better" if method == "datainf" else ""
        item = "ICLR version" if method == "datainf" else "not in the paper"
        rows.append((item, f"accuracy of models on what {label(method)} keeps, beside all data", paper_says, said))
    return rows


def _in_paper(identification: pd.DataFrame, paper: pd.Series, item: str, method: str, metric: str) -> str:
    """The paper's numbers for the tasks of these records, at the rank it has them for."""
    of_item = paper.xs((item, method, metric), level=("item", "method", "metric")).droplevel("rank")
    tasks = [kind for kind in dict.fromkeys(kind_of(identification)) if kind in of_item]
    return ", ".join(f"{of_item[kind]:g}" for kind in tasks)


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


_ROWS = {
    "approximation_error": [_approximation_rows],
    "mislabeled_detection": [_mislabeled_rows],
    "text_identification": [_class_detection_rows, _text_rows],
    "image_identification": [_class_detection_rows, _picture_rows],
    "ground_truth": [_ground_truth_rows],
    "data_selection": [_selection_rows],
}
