"""The leaderboard over seeds: means, intervals of the draws' means, and which order is resolved."""

import numpy as np
import pandas as pd
import pytest

from datainf.errors import InputError
from datainf.study import plotting, results, tables

SPREAD = 0.05


@pytest.fixture
def ground_truth(tmp_path):
    """Two seeds of one task and one of another, in files as notebook 70 writes them; `exact` is missing of one seed."""
    generator, rows = np.random.default_rng(0), []
    truths = {
        ("one", 0): {"datainf": 0.6, "hessian_free": 0.3, "random": 0.31, "exact": 0.9},
        ("one", 1): {"datainf": 0.4, "hessian_free": 0.3, "random": 0.29},
        ("two", 0): {"datainf": 0.2, "hessian_free": 0.5, "random": 0.0, "exact": 0.5},
    }
    for (dataset, seed), lds in truths.items():
        cell = {"dataset": dataset, "rank": 4, "seed": seed}
        drawn = pd.DataFrame({name: value + SPREAD * generator.standard_normal(1000) for name, value in lds.items()})
        results.save_draws(tmp_path / "runs" / f"ground_truth-{dataset}-{seed}.csv", {"halves": drawn}, **cell)
        rows += [
            {**cell, "design": "halves", "method": name, "lds": value, "ceiling": 0.9, "retrainings": 100 - seed}
            for name, value in lds.items()
        ]
    return pd.DataFrame(rows), results.load_draws(tmp_path / "draws")


def test_intervals_are_of_the_means_over_seeds(ground_truth):
    lds = tables.lds_over_seeds(*ground_truth).set_index(["dataset", "method"])
    assert ("one", "exact") not in lds.index and ("two", "exact") in lds.index
    one = lds.loc[("one", "datainf")]
    assert (one["seeds"], one["retrainings"]) == (2, 99) and one["lds"] == pytest.approx(0.5)
    half = 1.96 * SPREAD / 2**0.5  # of a mean of two
    assert one["low"] == pytest.approx(0.5 - half, abs=0.01) and one["high"] == pytest.approx(0.5 + half, abs=0.01)
    alone = lds.loc[("two", "datainf")]
    assert alone["high"] - alone["low"] == pytest.approx(2 * 1.96 * SPREAD, abs=0.02)
    board = tables.leaderboard(lds.reset_index())
    assert list(board.columns) == ["one, rank 4: halves", "two, rank 4: halves"]
    assert board.loc["DataInf", "one, rank 4: halves"].startswith("0.50 [0.4")
    assert board.index[-1] == "a perfect predictor"
    figure = plotting.by_task(lds.reset_index(), "title")
    assert "at least 99 retrainings of each design, 1 to 2 seeds" in figure.get_suptitle()


def test_neighbours_are_resolved_or_not(ground_truth):
    order = tables.lds_neighbours(ground_truth[1]).set_index(["dataset", "method", "next"])
    one, two = order.loc["one"], order.loc["two"]
    # A method that one of the seeds does not have cannot be compared in pairs with the others.
    assert set(one.index.get_level_values("method")) | set(one.index.get_level_values("next")) == {
        *("datainf", "hessian_free", "random")
    }
    leads = one.xs("datainf", level="method").iloc[0]
    assert leads["resolved"] and leads["difference"] == pytest.approx(0.2, abs=0.02) and leads["seeds"] == "2 of 2"
    close = one.iloc[-1]  # the random scores and Hessian-free have the same mean
    assert not close["resolved"] and close["seeds"] == "1 of 2"
    assert len(two) == 3 and two["seeds"].isin(["0 of 1", "1 of 1"]).all()
    assert two.loc[("datainf", "random"), "resolved"] and two.loc[("datainf", "random"), "seeds"] == "1 of 1"


def test_what_is_above_datainf(ground_truth):
    over = tables.lds_over(ground_truth[1])
    one, two = over["one, rank 4: halves"], over["two, rank 4: halves"]
    assert one["Hessian-free"].startswith("-0.2") and one["Hessian-free"].endswith("*") and one["Exact"] == ""
    assert two["Exact"].startswith("+0.3") and two["Exact"].endswith("*") and "DataInf" not in over.index


def test_folders_without_draws_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no draws of the ground truth"):
        results.load_draws(tmp_path)
