"""Notebook 70 on a task of each family, as small as it can be, and what it refuses."""

import pandas as pd
import pytest
from running import assert_refused, run

from datainf.evaluation.retraining import Bank
from datainf.study import ground_truth

NAME = "70_ground_truth"
FEW = {
    "halves": 10,
    "removals": 0,
    "halves_in_same": 10,
    "removals_in_same": 0,
    "repeats": 4,
    "folds": 2,
    "members": 2,
    "top_shares": [0.1],
    "methods": ["datainf", "exact@10"],
}
FAMILIES = {
    "classification": {"dataset": "demo-reviews", "n_train": 20, "n_query": 8, "epochs": 1},
    "text": {
        "model": "demo-llama",
        "dataset": "math_without_reasoning",
        "n_train": 2,
        "n_query": 1,
        "epochs": 1,
        "noise": 0.0,
        "learning_rate": 0.01,
        "top_shares": [],
    },
    "images": {
        "model": "demo-diffusion",
        "dataset": "demo-style",
        "n_train": 4,
        "n_query": 2,
        "steps": 3,
        "noise": 0.0,
        "top_shares": [],
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_of_each_family(family, tmp_path):
    output = tmp_path / "runs" / "ground_truth-it-r2-s0.csv"
    given = FEW | {"family": family, "rank": 2, "cache": str(tmp_path / "cache"), "output": str(output)}
    run(NAME, **(given | FAMILIES[family]))
    record = pd.read_csv(output)
    assert set(record["design"]) == {"half left out, fresh batches", "half left out, same batches"}
    assert {"datainf", "exact@10", "gradient_cosine", "training_loss", "random"} <= set(record["method"])
    assert (record["low"] <= record["lds"]).all() and (record["lds"] <= record["high"]).all()
    fresh = record[record["batches"] == "own"]
    assert fresh["ceiling"].between(0, 1).all() and record[record["batches"] == "same"]["ceiling"].isna().all()
    bank = Bank.load(tmp_path / "banks" / "ground_truth-it-r2-s0.parquet")
    assert len(bank.select(design="subset")) >= 20 and bank.about["task"] == FAMILIES[family]["dataset"]
    assert (bank.right is None) == (family == "images")
    draws = pd.read_parquet(tmp_path / "draws" / "ground_truth-it-r2-s0.parquet")
    assert set(draws["design"]) == set(record["design"]) and len(draws) == 2 * 1000
    if family == "classification":
        assert record["auc"].between(0, 1).all() and record["qld_10"].notna().any()
        assert "cleanlab_cross_validated" in set(record["method"])
        # The bank that was made is taken instead of retraining.
        again = given | FAMILIES[family] | {"bank": str(tmp_path / "banks" / output.with_suffix(".parquet").name)}
        again |= {"cache": str(tmp_path / "elsewhere"), "members": 1}
        run(NAME, **(again | {"output": str(tmp_path / "again" / "runs" / "it.csv")}))
        other = pd.read_csv(tmp_path / "again" / "runs" / "it.csv")
        pd.testing.assert_series_equal(other["lds"], record["lds"])
        assert len(Bank.load(tmp_path / "again" / "banks" / "it.parquet")) == len(bank)
        assert not list((tmp_path / "elsewhere").glob("*/retrainings/*"))
        assert_refused("InputError: The bank is of another", NAME, tmp_path, **(again | {"epochs": 2}))
        # Of a folder of banks that which is of this task is taken.
        banks = str(tmp_path / "banks")
        assert len(ground_truth.known_bank(banks, bank.about)) == len(bank)
        assert len(ground_truth.known_bank(banks, bank.about, needed=False)) == len(bank)
        assert ground_truth.known_bank(banks, bank.about | {"task": "another"}, needed=False) is None
        assert_refused("is of another recipe", NAME, tmp_path, **(again | {"bank": banks, "epochs": 2}))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"family": "sounds"}, "InputError: family must be classification, text or images, not 'sounds'."),
        ({"methods": ["datinf@1"]}, "Unknown method 'datinf'"),
        ({"bank": "./nothing.parquet"}, "InputError: There is no bank"),
        ({"halves": 3, "halves_in_same": 0}, "InputError: An LDS takes 10 retrainings at least"),
        ({"removals": 12, "n_train": 8, "top_shares": []}, "A share of 0.05 of 8 examples leaves out 0"),
    ],
)
def test_what_does_not_fit_ends_in_one_sentence(given, sentence, tmp_path):
    assert_refused(sentence, NAME, tmp_path, **(FEW | FAMILIES["classification"] | given))
