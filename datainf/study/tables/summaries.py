"""Tables of what was measured, most of them beside the paper's, and of examples to be read."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from pandas.io.formats.style import Styler

from datainf.evaluation import counterfactual
from datainf.evaluation.paired import confidence_interval
from datainf.study.plotting import BASELINES, label


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


CELL = ["dataset", "rank", "design"]


def lds_over_seeds(truth: pd.DataFrame, draws: pd.DataFrame) -> pd.DataFrame:
    """The mean LDS over the seeds of a task, rank and design, with its 95% interval for these seeds: of their bootstrap
    draws' means.

    Args:
        truth: records of the ground truth; `draws` as `results.load_draws` gives them.

    Returns:
        Columns dataset, rank, design, method, lds, low, high, ceiling, seeds, retrainings (the fewest of a seed); of
        methods that all these seeds have.
    """
    means = truth.groupby([*CELL, "method"], sort=False).agg(
        lds=("lds", "mean"), ceiling=("ceiling", "mean"), seeds=("seed", "nunique"), retrainings=("retrainings", "min")
    )
    limits = _over_seeds(draws).groupby(CELL, sort=False).quantile([0.025, 0.975])
    limits = limits.rename_axis(columns="method").stack().dropna().unstack(-2).set_axis(["low", "high"], axis=1)
    return means.join(limits, how="inner").reset_index()


def lds_neighbours(draws: pd.DataFrame) -> pd.DataFrame:
    """Is the order of methods resolved? `counterfactual.neighbours` of the means over seeds, by task, rank and design;
    ``seeds`` says in how many of them the order is this one."""
    tables = []
    for cell, some in _over_seeds(draws).groupby(CELL, sort=False):
        table = counterfactual.neighbours(some.dropna(axis=1, how="any"))
        here = draws.set_index(CELL).loc[[cell]].groupby("seed").mean(numeric_only=True)
        agree = [(here[one] > here[other]).sum() for one, other in zip(table["method"], table["next"], strict=True)]
        seeds = [f"{count} of {len(here)}" for count in agree]
        tables.append(table.assign(seeds=seeds, **dict(zip(CELL, cell, strict=True))))
    return pd.concat(tables, ignore_index=True)[[*CELL, *tables[0].columns.drop(CELL)]]


def lds_over(draws: pd.DataFrame, method: str = "datainf") -> pd.DataFrame:
    """What each method's mean LDS over seeds is above that of one of them, with the 95% interval of their paired
    difference, to be read: a row per method, a column per task, rank and design; * where the interval excludes 0."""
    means = _over_seeds(draws)
    over = means.sub(means[method], axis=0).drop(columns=method)

    def said(differences: pd.Series) -> str:
        low, high = differences.quantile([0.025, 0.975])
        star = " *" if low * high > 0 else ""
        return "" if differences.isna().any() else f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]{star}"

    best = over.groupby(CELL).mean().mean().sort_values(ascending=False).index
    table = over.groupby(CELL, sort=False).agg(said).T.reindex(best).rename(label).rename_axis("method")
    return _flat(table)


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """With one line of headings instead of `CELL`'s three."""
    table.columns = [f"{dataset}, rank {rank}: {design}" for dataset, rank, design in table.columns]
    return table


def _over_seeds(draws: pd.DataFrame) -> pd.DataFrame:
    """Their means; not a number where a method is missing of a seed, beside which it could not be compared in pairs."""
    seeds = draws.drop(columns="seed").groupby([*CELL, "draw"], sort=False)
    return seeds.mean().where(seeds.count().eq(seeds.size(), axis=0))


def leaderboard(lds: pd.DataFrame) -> pd.DataFrame:
    """`lds_over_seeds` to be read: a row per method, the best on average on top, a column per task, rank and design; in
    the last row what a perfect predictor would reach."""
    means = lds.set_index(["method", *CELL])
    best = means["lds"].groupby("method").mean().sort_values(ascending=False).index
    text = means.apply(lambda row: f"{row['lds']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", axis=1)
    table = text.unstack(CELL).reindex(best).rename(label).fillna("")
    ceilings = means.groupby(CELL, sort=False)["ceiling"].mean()
    table.loc["a perfect predictor"] = ["1" if pd.isna(value) else f"{value:.2f}" for value in ceilings[table.columns]]
    return _flat(table)


def counterfactuals(truth: pd.DataFrame) -> pd.DataFrame:
    """What else the ground truth says of every method: a row per dataset, rank and method, means over the seeds that
    have it.

    Returns:
        ``QLD, 10%``: by how much the mean query's loss is higher without the 10% that the method holds for the most
        helpful than without as many random examples, in nats; ``flips, 10%``: the share of queries whose answer changes
        then, less that of the random ones; ``AUC``: of flipped labels; ``slope``: of the actual change of the loss
        against the predicted; ``seconds`` of everything after the gradients.
    """
    found = truth.groupby(["dataset", "rank", "method"], sort=False).mean(numeric_only=True)
    columns = {}
    for name in sorted(found.columns[found.columns.str.startswith("qld_")]):
        share = name.removeprefix("qld_")
        columns[f"QLD, {int(share)}%"] = found[name].round(3)
        if f"flips_{share}" in found:
            flips = found[f"flips_{share}"] - found[f"flips_random_{share}"]
            columns[f"flips, {int(share)}%"] = flips.round(3)
    names = {"auc": "AUC", "slope": "slope", "seconds_influence": "seconds"}
    columns |= {name: found[column] for column, name in names.items() if column in found}
    table = pd.DataFrame(columns, index=found.index).round({"AUC": 2, "seconds": 2})
    if "slope" in table:
        table["slope"] = table["slope"].map("{:.2g}".format, na_action="ignore")
    return table.rename(label, level="method")


IN_SHORT = [
    *("exact@training", "generalized_fisher@1", "kronecker@1", "ekfac@1", "exact", "lissa_scaled"),
    *("datainf", "hessian_free"),
]
WITHOUT_GRADIENTS = [name for name in BASELINES if name not in ("gradient_cosine", "self_influence")]


def leaderboard_in_short(lds: pd.DataFrame, design: str = "half left out, fresh batches") -> pd.DataFrame:
    """Of `lds_over_seeds` what the README shows: a column per task, of one design and of the rank that has the most
    seeds; a perfect predictor, the methods that are recommended and the paper's, and the best without gradients."""
    some = lds[lds["design"] == design].sort_values("seeds", ascending=False, kind="stable")
    some = some[some["rank"] == some.groupby("dataset")["rank"].transform("first")]
    table = {}
    for dataset, task in some.groupby("dataset"):
        task, seeds = task.set_index("method"), task["seeds"].max()
        highest = task.loc[task.index.isin(IN_SHORT), "lds"].max()
        column = {"*a perfect predictor*": f"*{task['ceiling'].mean():.2f}*"}
        for method, row in task.reindex(IN_SHORT).dropna(subset="lds").iterrows():
            value = f"{row['lds']:.2f}"
            value = f"**{value}**" if value == f"{highest:.2f}" else value
            column[label(method)] = f"{value} [{row['low']:.2f}, {row['high']:.2f}]"
        best = task["lds"].reindex(WITHOUT_GRADIENTS).idxmax()
        column["the best without gradients"] = f"{task.loc[best, 'lds']:.2f}, {label(best)}"
        table[f"{dataset} ({seeds} seed{'s' if seeds > 1 else ''})"] = column
    return pd.DataFrame(table).fillna("").rename_axis("LDS")


def mean_and_error(values: pd.Series) -> str:
    """A mean and its standard error over runs, such as "0.967 ± 0.001"."""
    return f"{values.mean():.3f}" + (f" ± {values.sem():.3f}" if len(values) > 1 else "")


# What the gradients are of, as the two texts that a loss can be justified by have it.
LOSSES = {
    "completion": "the response (the paper's text)",
    "as_published": "the prompt (its published code)",
    "common_preamble": "the prompt after words that all prompts share",
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
    tasks = kind_of(identification).groupby(identification["dataset"], sort=False).first()
    found = {name: paper.xs(kind) for name, kind in tasks.items() if kind in paper.index.get_level_values(0)}
    return pd.concat(found, names=["dataset"]) if found else paper.iloc[:0]


def kind_of(identification: pd.DataFrame) -> pd.Series:
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
    """A table in GitHub's Markdown; nothing where there is nothing."""
    table = table if columns is None else table[list(columns)]
    text = table.map(lambda cell: "" if pd.isna(cell) else str(cell))
    lines = [list(table.columns), ["---"] * table.shape[1], *text.values.tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines) + "\n"
