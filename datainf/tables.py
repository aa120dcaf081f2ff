"""The study's tables: what the paper reports beside what was measured here."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from pandas.io.formats.style import Styler

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


def mean_and_error(values: pd.Series) -> str:
    """A mean and its standard error over runs, such as "0.967 ± 0.001"."""
    return f"{values.mean():.3f}" + (f" ± {values.sem():.3f}" if len(values) > 1 else "")


# What the gradients are of, as the two texts that a loss can be justified by have it.
LOSSES = {
    "completion": "the response (the paper's text)",
    "as_published": "the prompt (its published code)",
    "mean": "the mean over timesteps",
    "concat": "the timesteps side by side (its published code)",
}


def class_detection(identification: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Table 2: class-detection AUC and recall by task and method, for each loss beside the paper's.

    By |score|, as in the paper's text; the last columns are of the AUC by helpfulness, the negated score.

    Ours are means and standard errors over seeds; the paper's are over the test examples of one run.
    """
    cells = identification.groupby(["dataset", "method", "loss"], sort=False)
    ours = cells[["auc", "recall", "auc_signed"]].agg(mean_and_error)
    paper = reported.query("item == 'Table 2'").set_index(["dataset", "method", "metric"])["value"].unstack()
    paper = _by_our_names(paper, identification)
    table = {}
    for metric, name in (("auc", "AUC"), ("recall", "recall")):
        by_loss = ours[metric].unstack("loss")
        table |= {f"{name}, {loss}": by_loss[loss] for loss in LOSSES if loss in by_loss}
        error = paper[f"{metric}_se"].map(" ± {:.3f}".format)
        table[f"{name} (paper)"] = paper[metric].map("{:.3f}".format) + error
    by_loss = ours["auc_signed"].unstack("loss")
    table |= {f"AUC by helpfulness, {loss}": by_loss[loss] for loss in LOSSES if loss in by_loss}
    return pd.DataFrame(table).reindex(by_loss.index).fillna("").rename(label, level="method")


def _by_our_names(paper: pd.DataFrame, identification: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows of these tasks, under the names of the datasets that stand for them here.

    A record of pictures names the paper's task in its column `kind`; a text task has the paper's own name.
    """
    tasks = _kind_of(identification).groupby(identification["dataset"], sort=False).first()
    found = {name: paper.xs(kind) for name, kind in tasks.items() if kind in paper.index.get_level_values(0)}
    return pd.concat(found, names=["dataset"]) if found else paper.iloc[:0]


def _kind_of(identification: pd.DataFrame) -> pd.Series:
    """What the paper calls the task of each record."""
    return identification["kind"] if "kind" in identification else identification["dataset"]


def accuracy_gained(identification: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Table 4: accuracy of the base and of the fine-tuned model by task, ours (mean over seeds) beside the paper's."""
    models = identification.drop_duplicates(["dataset", "rank", "seed"])
    paper = reported.query("item == 'Table 4'").pivot_table("value", "dataset", "method")
    table = models.groupby("dataset", sort=False).agg(
        model=("model", "first"),
        n=("n_train", "max"),
        seeds=("seed", "nunique"),
        base=("accuracy_base", "mean"),
        fine_tuned=("accuracy", mean_and_interval),
    )
    table["base"] = table["base"].map("{:.2f}".format)
    for name in ("base", "fine_tuned"):
        table[f"{name} (paper)"] = paper[name].map("{:.2f}".format)
    return table.fillna("").rename(columns=lambda name: name.replace("_", "-"))


def distance_gained(pictures: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Table 4: Fréchet distance of generated from test pictures before and after fine-tuning, beside the paper's."""
    models = pictures.drop_duplicates(["dataset", "rank", "seed"])
    models = models.assign(closer=models["frechet"] < models["frechet_base"])
    table = models.groupby("dataset", sort=False).agg(
        model=("model", "first"),
        n=("n_train", "max"),
        seeds=("seed", "nunique"),
        closer=("closer", lambda closer: f"{closer.sum()} of {len(closer)}"),
        features=("frechet_features", "first"),
        base=("frechet_base", mean_and_interval),
        fine_tuned=("frechet", mean_and_interval),
        kind=("kind", "first"),
    )
    paper = reported.query("item == 'Table 4' and metric == 'fid'").pivot_table("value", "dataset", "method")
    paper = paper.reindex(columns=["base", "fine_tuned"]).reindex(table.pop("kind")).set_axis(table.index)
    shown = paper.map(lambda value: "" if pd.isna(value) else f"{value:.1f}").add_suffix(" (paper, FID)")
    names = {"closer": "runs closer", "fine_tuned": "fine-tuned", "fine_tuned (paper, FID)": "fine-tuned (paper, FID)"}
    return table.join(shown).rename(columns=names)


def ours_beside_paper(
    errors: pd.DataFrame,
    detection: pd.DataFrame,
    identification: pd.DataFrame,
    pictures: pd.DataFrame,
    reported: pd.DataFrame,
) -> pd.DataFrame:
    """The paper's numbers and claims, one a row, with what the records of this scale say.

    Args:
        errors, detection, identification, pictures: records of the approximation-error, the mislabeled-detection and
            the text and image identification runs.
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
    rows += _class_detection_rows(identification, paper) + _text_rows(identification, paper)
    rows += _class_detection_rows(pictures, paper) + _picture_rows(pictures, paper)
    return pd.DataFrame(rows, columns=["item", "claim", "paper", "ours"])


Claim = tuple[str, str, str, str]


def _class_detection_rows(identification: pd.DataFrame, paper: pd.Series) -> list[Claim]:
    """The rows of `ours_beside_paper` on class detection, by |score|, one mean over seeds for each task."""
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
    """The rows of `ours_beside_paper` on exchanged responses and on what the language models learned."""
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
    """The row of `ours_beside_paper` on what the diffusion models learned."""
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


def _in_paper(identification: pd.DataFrame, paper: pd.Series, item: str, method: str, metric: str) -> str:
    """The paper's numbers for the tasks of these records, at the rank it has them for."""
    of_item = paper.xs((item, method, metric), level=("item", "method", "metric")).droplevel("rank")
    tasks = [kind for kind in dict.fromkeys(_kind_of(identification)) if kind in of_item]
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


def influential(train: pd.DataFrame, query: Mapping[str, str], scores: Float[np.ndarray, " n"], k: int = 2) -> Styler:
    """A query with its most and least influential training examples, to be read (the paper's Figure 3).

    Args:
        train: columns class, prompt and response, a row per training example; `query` has the same names.
        scores: of the training examples for this query. Most influential are the largest |scores|, least influential
            the smallest; scores are shown as shares of the largest.
    """
    order = np.argsort(-np.abs(scores), kind="stable")
    columns = ["class", "prompt", "response"]
    rows = [{"": "test example", "score": "", **{name: query[name] for name in columns}}]
    for role, places in (("most influential", order[:k]), ("least influential", order[-k:][::-1])):
        rows += [
            {"": role, "score": f"{scores[i] / np.abs(scores).max():+.2g}", **train.iloc[i][columns]} for i in places
        ]
    style = {"text-align": "left", "white-space": "pre-wrap", "vertical-align": "top"}
    return pd.DataFrame(rows).style.hide(axis="index").set_properties(**style)


def to_markdown(table: pd.DataFrame, columns: Iterable[str] | None = None) -> str:
    """A table in GitHub's Markdown."""
    table = table if columns is None else table[list(columns)]
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines) + "\n"
