"""Is what was reproduced what was published? ``python -m datainf.study.verdict SCALE`` (make verify SCALE=...).

Every published number and claim of a scale beside ours. On one machine with one environment they are equal. Elsewhere
arithmetic rounds otherwise, fine-tuning amplifies it, and a run may come out as if it had another seed; so the mean of
k seeds may move by

    tolerance = t * s * sqrt(2 / k),

s being the standard deviation over the published seeds (pooled over the datasets and ranks of an experiment, method and
metric) and t the two-sided 99% quantile of Student's distribution for its degrees of freedom. A claim is computed from
all runs, so its standard error is the jackknife's: of the claim computed anew without each seed in turn. What was
published with a single seed has no tolerance. Times and process memory are left out: they are the machine's.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from scipy import stats

from datainf.errors import InputError
from datainf.storage.files import write_whole
from datainf.study import results, sweep
from datainf.study.provenance import ROOT
from datainf.study.tables import claims_of, to_markdown

PUBLISHED = ROOT / "results" / "published"
CONFIDENCE = 0.99

EQUAL, WITHIN, OUTSIDE, UNJUDGED, MISSING = "equal", "within", "OUTSIDE", "not judged", "not run"
"""How a number of ours stands to the published one."""

CELL = ["experiment", "dataset", "rank", "loss", "design", "share", "method", "metric"]
"""What names a number of an experiment: its mean over seeds is one number."""

METRICS = [
    *("accuracy", "accuracy_base", "majority", "pearson", "spearman", "auc", "auc_signed", "recall", "recall_signed"),
    *("prompt_preferred", "prompt_preferred_signed", "frechet_base", "frechet"),
    *("lds", "lds_of_mean", "lds_averaged", "ceiling", "slope"),
    *("accuracy_gain", "loss_gain", "groups_agreement"),
    *("qld_01", "qld_05", "qld_10", "flips_01", "flips_05", "flips_10"),
]
LESSONS = {  # what names a row of a lesson's record, and its numbers
    "leave_one_out": (["method"], ["pearson", "spearman"]),
    "theorem1": (["gradients", "d"], ["difference", "times_lambda", "correlation", "slope"]),
    "table1_complexity": (["sweep", "size", "method"], ["peak_bytes"]),
    "memory_budget": (["method", "budget_mb"], ["peak_mb"]),
    "your_adapter": (["method"], ["found_in_top_tenth", "auc"]),
}
SETTINGS = ["n_train", "epochs", "learning_rate", "batch_size", "damping", "layers"]
INPUTS = {"model_revision": "model", "data_revision": "data"} | {name: name for name in SETTINGS}
"""Columns by which a run's base, data and settings are known."""
ENVIRONMENT = ["device", "threads", "python", "torch", "transformers", "peft", "diffusers", "datasets"]
"""Columns by which one machine with one environment is known."""

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])")


def verdict(published: Path, ours: Path, reported: pd.DataFrame) -> "Verdict":
    """Compare the records in two folders of results.

    Args:
        reported: the paper's numbers, `results.paper_reported`.

    Raises:
        InputError: nothing is published there, or nothing was run.
    """
    theirs, mine = (_records(folder) for folder in (published, ours))
    made = [_environments(records) for records in (theirs, mine)]
    same = all(made[0][name] == made[1][name] for name in made[0].keys() & made[1].keys())
    numbers = pd.concat([_experiments(theirs, mine, same), _lessons(theirs, mine, same)], ignore_index=True)
    return Verdict(numbers, _claims(theirs, mine, reported, same), theirs, mine)


class Verdict:
    """`numbers` and `claims`, each with the columns published, ours, difference, tolerance and status."""

    def __init__(self, numbers: pd.DataFrame, claims: pd.DataFrame, theirs: Mapping, mine: Mapping):
        self.numbers, self.claims = numbers, claims
        self.others = _other_inputs(theirs, mine)
        self._made_by = {"published": _made_by(theirs), "ours": _made_by(mine)}

    @property
    def holds(self) -> bool:
        """Whether models, data and settings are the same, nothing is missing, and no more is outside its tolerance than
        one in a hundred."""
        status = pd.concat([self.numbers["status"], self.claims["status"]])
        return not self.others and not (status == MISSING).any() and (status == OUTSIDE).mean() <= 1 - CONFIDENCE

    def summary(self) -> str:
        """A few lines that say how it came out, and what made the two."""
        counts = pd.DataFrame({"numbers": self.numbers["status"], "claims": self.claims["status"]}).apply(
            pd.Series.value_counts
        )
        counts = counts.reindex([EQUAL, WITHIN, OUTSIDE, UNJUDGED, MISSING]).fillna(0).astype(int)
        unjudged = counts.loc[UNJUDGED].sum()
        if self.others:
            said = f"NOT of what was published: {'; '.join(self.others)}. Give the same, or read no more into it."
        elif not self.holds:
            said = "NOT reproduced as it was published: see what is OUTSIDE, or was not run."
        elif counts.loc[[WITHIN, OUTSIDE, UNJUDGED]].sum(axis=None) == 0:
            said = "Reproduced: all published numbers and claims are equal."
        else:
            said = "Reproduced: the published numbers and claims are within what seeds and machines do"
            said += f", but for {unjudged} of a single seed, which cannot be judged." if unjudged else "."
        what = ", ".join(f"{n} {status}" for status, n in counts["numbers"].items() if n)
        claimed = ", ".join(f"{n} {status}" for status, n in counts["claims"].items() if n)
        return "\n".join([said, f"numbers: {what}", f"claims: {claimed}"])

    def to_markdown(self, scale: str) -> str:
        """The whole verdict: the summary, what is not equal, every claim, every number."""
        differs = self.numbers[~self.numbers["status"].isin([EQUAL, WITHIN])]
        parts = [f"# Verdict: {scale}", *self.summary().split("\n"), "## What made the two", self._origins()]
        if len(differs):
            parts += ["## Numbers outside their tolerance, not judged or not run", _shown(differs)]
        parts += ["## Claims", _shown(self.claims), "## Numbers"]
        for experiment, rows in self.numbers.groupby("experiment", sort=False):
            title = f"<details><summary>{experiment}: {len(rows)} numbers</summary>"
            parts += [title, _shown(rows.drop(columns="experiment")), "</details>"]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def _origins(self) -> str:
        return to_markdown(pd.DataFrame(self._made_by).rename_axis("").reset_index())


def _shown(rows: pd.DataFrame) -> str:
    """A table for people: numbers to four digits, nothing where there is none."""
    text = rows.astype(object).map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    return to_markdown(text.mask(rows.isna(), ""))


def _records(folder: Path) -> dict[str, pd.DataFrame]:
    """The records of each experiment and lesson that there are."""
    found = {
        name: [pd.read_csv(path) for path in sorted((folder / "runs").glob(pattern))]
        for names, pattern_of in ((sweep.EXPERIMENTS, "{}-*.csv"), (sweep.LESSONS, "{}.csv"))
        for name, pattern in ((name, pattern_of.format(name)) for name in names)
    }
    if not any(found.values()):
        raise InputError(f"There are no records in {folder / 'runs'}: nothing to compare.")
    return {name: pd.concat(records, ignore_index=True) for name, records in found.items() if records}


def _made_by(records: Mapping[str, pd.DataFrame]) -> pd.Series:
    """The commits, devices and versions of some records, and whose model and data they are of."""
    columns = ["commit", *ENVIRONMENT, "model_revision", "data_revision"]
    values = {name: [set(r[name].dropna().astype(str)) for r in records.values() if name in r] for name in columns}
    return pd.Series({name: ", ".join(sorted(set().union(*found))) for name, found in values.items()})


def _other_inputs(theirs: Mapping, mine: Mapping) -> list[str]:
    """Which bases, data or settings are not those that are published."""
    found = []
    for name in sweep.EXPERIMENTS:
        for column, what in INPUTS.items():
            if name in theirs and name in mine and column in theirs[name] and column in mine[name]:
                keys = ["dataset", "rank", "seed"]
                pair = (records[name].drop_duplicates(keys).set_index(keys)[column] for records in (theirs, mine))
                both = pd.concat(pair, axis=1, join="inner").astype(str).fillna("")
                if (both.iloc[:, 0] != both.iloc[:, 1]).any():
                    found.append(f"another {what} in {name}")
    return found


def _environments(records: Mapping[str, pd.DataFrame]) -> dict[str, set]:
    """What machines and environments made each experiment."""
    known = {name: r.reindex(columns=ENVIRONMENT).astype(str) for name, r in records.items()}
    return {name: set(r.itertuples(index=False, name=None)) for name, r in known.items()}


def _long(records: pd.DataFrame, keys: list[str], metrics: list[str]) -> pd.Series:
    """One number a row, indexed by `keys` and metric. A loss that is a number was measured, and names nothing."""
    names = set(records) - ({"loss"} if "loss" in records and is_numeric_dtype(records["loss"]) else set())
    rows = records.assign(**{key: "" for key in keys if key not in names})
    rows = rows.melt(keys, [name for name in metrics if name in rows], "metric")
    return rows.set_index([*keys, "metric"])["value"].astype(float)


def _experiments(theirs: Mapping, mine: Mapping, same: bool) -> pd.DataFrame:
    """Means over seeds, published and ours, of every cell."""
    keys = [*CELL[:-1], "seed"]
    tables = []
    for name in sweep.EXPERIMENTS:
        if name not in theirs:
            continue
        published = _long(theirs[name], keys, METRICS).dropna()
        ours = _long(mine[name], keys, METRICS) if name in mine else published.iloc[:0]
        pair = pd.DataFrame({"published": published, "ours": ours.reindex(published.index)})
        pair["missing"] = ~pair.index.isin(ours.index)
        cells = pair.groupby(CELL, sort=False)
        table = cells[["published", "ours"]].mean()
        table["seeds"] = cells["published"].count()
        table["equal"] = (pair["published"] == pair["ours"]).groupby(CELL, sort=False).all()
        table["missing"] = cells["missing"].any()
        table["tolerance"] = 0.0 if same else _tolerance(cells["published"].var(), table["seeds"])
        tables.append(table.reset_index())
    return _judged(pd.concat(tables, ignore_index=True), ["seeds"]) if tables else pd.DataFrame()


def _tolerance(variance: pd.Series, seeds: pd.Series) -> pd.Series:
    """How far the mean of so many seeds may move: see the module's first lines. Not a number for a single seed."""
    pools = ["experiment", "loss", "design", "method", "metric"]
    freedom = (seeds - 1).groupby(pools, sort=False).transform("sum").replace(0, np.nan)
    pooled = ((seeds - 1) * variance).groupby(pools, sort=False).transform("sum") / freedom
    return stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * (pooled * 2 / seeds) ** 0.5


def _lessons(theirs: Mapping, mine: Mapping, same: bool) -> pd.DataFrame:
    """The numbers of the teaching notebooks, which have one seed: equal, or not judged."""
    tables = []
    for name, (keys, metrics) in LESSONS.items():
        if name not in theirs:
            continue
        published = _long(theirs[name], keys, metrics).dropna()
        ours = _long(mine[name], keys, metrics) if name in mine else published.iloc[:0]
        table = pd.DataFrame({"published": published, "ours": ours.reindex(published.index)}).reset_index()
        table["row"] = table[keys].astype(str).agg(", ".join, axis=1)
        table["equal"], table["missing"] = table["published"] == table["ours"], ~published.index.isin(ours.index)
        table["tolerance"] = 0.0 if same else np.nan
        tables.append(table.assign(experiment=name).drop(columns=keys))
    return _judged(pd.concat(tables, ignore_index=True), ["row"]) if tables else pd.DataFrame()


def _judged(table: pd.DataFrame, more: list[str]) -> pd.DataFrame:
    """The columns that a verdict shows, the status among them."""
    table["difference"] = table["ours"] - table["published"]
    table["status"] = np.select(
        [
            table["missing"],
            table["equal"],
            table["tolerance"].isna(),
            table["difference"].abs() <= table["tolerance"],
        ],
        [MISSING, EQUAL, UNJUDGED, WITHIN],
        OUTSIDE,
    )
    named = [name for name in CELL if name in table]
    return table[[*named, *more, "published", "ours", "difference", "tolerance", "status"]]


def _claims(theirs: Mapping, mine: Mapping, reported: pd.DataFrame, same: bool) -> pd.DataFrame:
    """Every claim of the table of ours beside the paper's, published and ours."""
    rows = []
    for name in sweep.EXPERIMENTS:
        if name not in theirs:
            continue
        published, seeds = _said(name, theirs[name], reported), sorted(set(theirs[name]["seed"]))
        try:
            ours = _said(name, mine[name], reported)
        except KeyError:  # the experiment, or a method that a claim is about
            ours = {}
        # Of a single seed nothing is left to compute a claim of.
        left_out = seeds if len(seeds) > 1 else []
        without = [_said(name, theirs[name].query("seed != @seed"), reported) for seed in left_out]
        for key, text in published.items():
            # What only one seed says anything of has nothing left without it.
            own, jackknife = ours.get(key, ""), [again[key] for again in without if key in again]
            found = {"item": key[0], "claim": key[1], "published": text, "ours": own}
            rows.append(found | _compared(text, own, jackknife, same))
    return pd.DataFrame(rows, columns=["item", "claim", "published", "ours", "difference", "tolerance", "status"])


def _said(experiment: str, records: pd.DataFrame, reported: pd.DataFrame) -> dict[tuple[str, str], str]:
    """(item, claim) -> what records say of it; claims of seconds are left out, and how many cells are resolved, which a
    cell near the edge changes whatever the others do."""
    found = claims_of(experiment, records, reported).set_index(["item", "claim"])["ours"]
    found = found.str.replace(r" \(resolved in .*?\)", "", regex=True)
    return {key: text for key, text in found.items() if not key[1].startswith("seconds")}


def _compared(published: str, ours: str, jackknife: list[str], same: bool) -> dict[str, object]:
    """The largest difference between the numbers of two claims, its tolerance, and the status that follows."""
    if not ours:
        return {"difference": np.nan, "tolerance": np.nan, "status": MISSING}
    theirs, mine = _numbers_in(published), _numbers_in(ours)
    if published == ours:
        return {"difference": 0.0, "tolerance": np.nan, "status": EQUAL}
    if same or NUMBER.sub("", published) != NUMBER.sub("", ours):
        difference = np.abs(mine - theirs).max() if len(mine) == len(theirs) else np.nan
        return {"difference": difference, "tolerance": 0.0, "status": OUTSIDE}
    if len(jackknife) < 2 or len(_numbers_in(jackknife[0])) != len(mine):  # of one seed less is said
        return {"difference": np.abs(mine - theirs).max(), "tolerance": np.nan, "status": UNJUDGED}
    k, without = len(jackknife), np.array([_numbers_in(text) for text in jackknife])
    error = ((k - 1) / k * np.square(without - without.mean(axis=0)).sum(axis=0)) ** 0.5
    last_digit = np.array([0.0101 if "." in number else 0 for number in NUMBER.findall(published)])  # that is printed
    tolerance = stats.t.ppf((1 + CONFIDENCE) / 2, k - 1) * error * 2**0.5 + last_digit
    difference = mine - theirs
    worst = int(np.argmax(np.where(difference == 0, -np.inf, np.abs(difference) - tolerance)))
    status = WITHIN if abs(difference[worst]) <= tolerance[worst] else OUTSIDE
    return {"difference": difference[worst], "tolerance": tolerance[worst], "status": status}


def _numbers_in(text: str) -> np.ndarray:
    return np.array([float(number) for number in NUMBER.findall(text)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare reproduced results with the published ones.")
    parser.add_argument("scale", help="demo, laptop, paper: whose results")
    scale = parser.parse_args().scale
    ours, published = ROOT / "results" / scale, PUBLISHED / scale
    if not published.is_dir():
        print(f"Nothing is published of the scale {scale}: there is nothing to compare with.")
        return
    try:
        found = verdict(published, ours, results.paper_reported(ROOT / "results"))
    except InputError as error:
        sys.exit(str(error))
    write_whole(ours / "verdict.md", found.to_markdown(scale))
    print(f"{found.summary()}\nAll of it: results/{scale}/verdict.md")
    sys.exit(0 if found.holds else 1)


if __name__ == "__main__":
    main()
