"""Differences in pairs and what is said of them, against scipy and by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from datainf.evaluation import paired

SEEDS = 8


@pytest.fixture
def runs():
    """Two datasets whose seeds differ by far more than the two methods do."""
    generator, rows = np.random.default_rng(0), []
    for dataset, gap in (("one", 0.05), ("two", -0.01)):
        for seed in range(SEEDS):
            base = generator.normal(0.7, 0.2)
            for method, more in (("datainf", gap), ("exact", 0.0)):
                auc = base + more + generator.normal(0, 0.01)
                rows.append({"dataset": dataset, "rank": 4, "seed": seed, "method": method, "auc": auc})
    return pd.DataFrame(rows)


def test_cells_are_judged_by_the_paired_test(runs):
    found = paired.order(paired.differences(runs, "auc", "datainf", "exact"))
    table = runs.pivot(index=["dataset", "seed"], columns="method", values="auc")
    for dataset, verdict in (("one", paired.HOLDS), ("two", None)):
        own = table.loc[dataset]
        low, high = stats.ttest_rel(own["datainf"], own["exact"]).confidence_interval()
        assert found.cells.loc[(dataset, 4), ["low", "high"]].tolist() == pytest.approx([low, high])
        assert verdict is None or found.cells.loc[(dataset, 4), "verdict"] == verdict
    assert found.mean == pytest.approx(0.02, abs=0.01) and found.seeds == SEEDS
    assert str(found).startswith("in 1 of 2 cells (resolved in 1, against it in ")


def test_datasets_of_one_seed_are_not_pooled_as_runs(runs):
    found = paired.order(paired.differences(runs, "auc", "datainf", "exact"))
    of_seeds = runs.pivot_table("auc", "seed", "method").eval("datainf - exact")
    expected = stats.ttest_1samp(of_seeds, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.verdict == (paired.HOLDS if found.low > 0 else paired.UNRESOLVED)


def test_about_as_well_allows_for_a_little(runs):
    gap = paired.differences(runs[runs["dataset"] == "two"], "auc", "datainf", "exact")
    assert paired.order(gap, least=-0.05).verdict == paired.HOLDS
    assert paired.order(gap, least=0.05).verdict == paired.FAILS


def test_what_could_have_been_resolved(runs):
    """A true difference of that size is resolved about as often as the power says."""
    gap = paired.differences(runs[runs["dataset"] == "one"], "auc", "datainf", "exact")
    generator, spread = np.random.default_rng(1), 0.02
    resolved, index = 0, gap.index
    detectable = (stats.t.ppf(0.975, SEEDS - 1) + stats.t.ppf(0.8, SEEDS - 1)) * spread / SEEDS**0.5
    for _ in range(400):
        drawn = pd.Series(generator.normal(detectable, spread, len(index)), index=index)
        resolved += paired.order(drawn).verdict == paired.HOLDS
    assert resolved / 400 == pytest.approx(0.8, abs=0.06)
    drawn = pd.Series(generator.normal(0, spread, len(index)), index=index)
    expected = stats.sem(drawn) * (stats.t.ppf(0.975, SEEDS - 1) + stats.t.ppf(0.8, SEEDS - 1))
    assert paired.order(drawn).detectable == pytest.approx(expected)


def test_one_seed_resolves_nothing(runs):
    found = paired.order(paired.differences(runs[runs["seed"] == 0], "auc", "datainf", "exact"))
    assert found.verdict == paired.UNRESOLVED and np.isnan(found.low) and np.isnan(found.detectable)
    assert str(found).endswith(", of one seed")


def test_a_cell_with_fewer_seeds_is_counted_but_not_judged(runs):
    alone = runs[runs["seed"] == 0].assign(rank=8)
    found = paired.order(paired.differences(pd.concat([runs, alone]), "auc", "datainf", "exact"))
    expected = paired.order(paired.differences(runs, "auc", "datainf", "exact"))
    assert (len(found.cells), found.judged, found.seeds) == (4, 2, SEEDS)
    assert (found.mean, found.low, found.high) == (expected.mean, expected.low, expected.high)
    assert str(found).endswith(f"over 2 of them, which have {SEEDS} seeds")


def test_cells_that_share_three_seeds_are_judged_together(runs):
    """However many some of them have: no cell is left out of a verdict because others were run more often."""
    fewer = runs[runs["seed"] < 3].assign(rank=8, dataset="another")
    found = paired.order(paired.differences(pd.concat([runs, fewer]), "auc", "datainf", "exact"))
    expected = paired.order(paired.differences(pd.concat([runs[runs["seed"] < 3], fewer]), "auc", "datainf", "exact"))
    assert (found.judged, found.seeds, found.most_seeds) == (len(found.cells), 3, SEEDS)
    assert (found.mean, found.low, found.high) == (expected.mean, expected.low, expected.high)
    assert str(found).endswith("over the 3 seeds of all")
