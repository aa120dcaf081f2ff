"""Notebook 71 on a task of each family, as small as it can be, and what it refuses."""

import pandas as pd
import pytest
from running import assert_refused, run

NAME = "71_which_hessian"
FEW = {
    **{"halves": 10, "removals": 0, "halves_in_same": 10, "removals_in_same": 0, "repeats": 0, "rank": 2},
    "dampings": [0.1, 10],
}
FAMILIES = {  # a classifier's run is in test_notebooks
    "text": {
        **{"model": "demo-llama", "dataset": "math_without_reasoning", "n_train": 2, "n_query": 1, "epochs": 1},
        **{"noise": 0.0, "learning_rate": 0.01, "unrolled_queries": 0, "weighted_examples": 0},
    },
    "images": {
        **{"model": "demo-diffusion", "dataset": "demo-style", "n_train": 4, "n_query": 2, "steps": 3},
        **{"noise": 0.0, "unrolled_queries": -1},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_of_each_family(family, tmp_path):
    output = tmp_path / "runs" / "which_hessian-it-r2-s0.csv"
    given = FEW | {"family": family, "cache": str(tmp_path / "cache"), "output": str(output)} | FAMILIES[family]
    run(NAME, **given)
    record = pd.read_csv(output)
    assert not record.duplicated(["design", "method"]).any()
    assert record[["curvature", "part", "aggregate"]].notna().all(axis=None)
    methods = set(record["method"])
    assert {"datainf@0.1", "exact@10", "joint@0.1", "exact@training", "exact@1, lora_A", "datainf+ranks"} <= methods
    assert ("ekfac@0.1" in methods) == (family != "images")
    assert ("exact@0.1, true Fisher" in methods) == (family != "images")
    assert ("unrolled" in methods) == (family != "images")
    assert record["lds"].dropna().between(-1, 1).all()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"dampings": [0.1]}, "InputError: dampings must be two at least, such as"),
        ({"halves": 3, "halves_in_same": 0}, "InputError: An LDS takes 10 retrainings at least"),
    ],
)
def test_what_does_not_fit_ends_in_one_sentence(given, sentence, tmp_path):
    assert_refused(sentence, NAME, tmp_path, **(FEW | {"dataset": "demo-reviews"} | given))
