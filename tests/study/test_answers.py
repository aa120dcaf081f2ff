"""How an experiment's notebook ends: its own run beside the paper and the published seeds."""

import pandas as pd
import pytest

from datainf.study import results, tables
from datainf.study.provenance import ROOT

RUNS = ROOT / "results" / "published" / "demo" / "runs"


@pytest.mark.parametrize(
    ("datainf", "hessian_free", "sentence"),
    [
        (0.74, 0.68, "By AUC, **DataInf** comes before Hessian-free, 0.740 against 0.680: as expected, in this"),
        (0.68, 0.74, "By AUC, **Hessian-free** comes before DataInf, 0.740 against 0.680: **contrary** to what"),
        (0.7, 0.7, "By AUC, **Hessian-free** comes before DataInf, 0.700 against 0.700: **contrary** to what"),
        (0.7, float("nan"), "This run does not say: it has no AUC of Hessian-free."),
    ],
)
def test_the_first_of_two_is_named_and_what_it_says(datainf, hessian_free, sentence):
    values = {"datainf": datainf, "hessian_free": hessian_free}
    assert tables.first_of_two(values, "datainf", "hessian_free", "AUC").startswith(sentence)


def test_a_method_that_did_not_run_is_named():
    assert tables.first_of_two({"datainf": 0.7}, "datainf", "lissa", "AUC").endswith("no AUC of LiSSA.")


def test_one_run_stands_beside_the_published_seeds():
    run = pd.read_csv(RUNS / "approximation_error-demo-reviews-r8-s0.csv")
    table = tables.beside_published(run, experiment="approximation_error").data.set_index("claim")
    row = table.loc["DataInf correlates more than Hessian-free (Pearson)"]
    pearson = run.set_index("method")["pearson"]
    answer, difference = row["this run"].split(": ")
    assert float(difference) == pytest.approx(pearson["datainf"] - pearson["hessian_free"], abs=1e-3)
    assert answer == ("yes" if float(difference) > 0 else "no") and row["paper"] == "always"
    # What the published seeds say is what their own table says.
    reported = results.paper_reported(ROOT / "results")
    claims = tables.claims_of("approximation_error", results.load_runs(RUNS, "approximation_error"), reported)
    assert row["published seeds, demo"] == claims.set_index("claim")["verdict"][row.name]
    assert not table.index.str.contains("lowest rank").any()  # of ranks, one run says nothing


def test_claims_about_methods_that_did_not_run_are_left_out():
    run = pd.read_csv(RUNS / "approximation_error-demo-reviews-r8-s0.csv")
    few = run[run["method"].isin(["datainf", "lissa", "exact"])]
    table = tables.beside_published(few, experiment="approximation_error").data
    assert list(table["claim"]) == [f"DataInf correlates more than LiSSA (10) ({by})" for by in ("Pearson", "Spearman")]
