"""How an experiment's notebook ends: what its one run answers, beside the paper and the published seeds."""

from collections.abc import Mapping

import pandas as pd
from pandas.io.formats.style import Styler

from datainf.study import results
from datainf.study.plotting import label
from datainf.study.provenance import ROOT
from datainf.study.tables.claims import claims_of

PUBLISHED = ROOT / "results" / "published"
SCALES = ("demo", "demo-text", "laptop", "paper")
ONE_RUN = {"in 1 of 1 cells; mean ": "yes: ", "in 0 of 1 cells; mean ": "no: ", ", of one seed": ""}


def first_of_two(values: Mapping[str, float], expected: str, rival: str, measure: str) -> str:
    """One sentence, in Markdown: which of two methods came first in this run, and what that says of an expectation.

    Args:
        values: of each method, such as its AUC; higher is better.
        expected: the method that should come first.
    """
    if missing := [name for name in (expected, rival) if name not in values or pd.isna(values[name])]:
        return f"This run does not say: it has no {measure} of {label(missing[0])}."
    ahead, behind = sorted((expected, rival), key=lambda name: (values[name], name == rival), reverse=True)
    numbers = f"{values[ahead]:.3f} against {values[behind]:.3f}"
    verdict = "as expected" if ahead == expected else "**contrary** to what was expected"
    return f"By {measure}, **{label(ahead)}** comes before {label(behind)}, {numbers}: {verdict}, in this one run."


def beside_published(record: pd.DataFrame, **facts) -> Styler:
    """The claims about an order: what the paper says, one run, and the published runs by scale; a row per claim.

    A run says yes or no and by how much; what seeds say is one of the verdicts of `evaluation.paired`.

    Args:
        record, facts: of the run, as `results.save_run` takes them.
    """
    experiment = facts["experiment"]
    reported = results.paper_reported(ROOT / "results")

    def orders(runs: pd.DataFrame) -> pd.DataFrame:
        claims = claims_of(experiment, runs, reported).set_index(["item", "claim"])
        return claims[claims["verdict"] != ""]

    here = orders(record.assign(**facts))
    table = here[["paper"]].assign(**{"this run": here["ours"].replace(ONE_RUN, regex=True)})
    for scale in SCALES:
        runs = results.load_runs(PUBLISHED / scale / "runs", experiment)
        if len(runs):
            table[f"published seeds, {scale}"] = orders(runs)["verdict"]
    return table.fillna("").reset_index().style.hide(axis="index").set_properties(**{"text-align": "left"})
