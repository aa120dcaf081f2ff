"""Notebook 75 on a task with flipped labels and on one in classes, as small as it can be, and what it refuses."""

import pandas as pd
import pytest
from running import assert_refused, run

from datainf.evaluation.retraining import Bank
from datainf.study import plotting, tables

NAME = "75_data_selection"
FEW = {
    **{"n_train": 20, "n_query": 8, "n_unseen": 12, "epochs": 1, "rank": 2, "folds": 2},
    **{"shares": [0.8], "relabel_shares": [0.2], "methods": ["datainf"], "baselines": ["training_loss", "random"]},
}
TEXT = {
    **{"family": "text", "model": "demo-llama", "dataset": "math_without_reasoning", "n_train": 2, "n_query": 1},
    **{"n_unseen": 1, "noise": 0.0, "learning_rate": 0.01, "relabel_shares": [], "baselines": ["bm25"]},
}


def test_a_task_with_flipped_labels(tmp_path):
    output = tmp_path / "runs" / "data_selection-it-r2-s0.csv"
    run(NAME, **FEW, cache=str(tmp_path / "cache"), output=str(output))
    record = pd.read_csv(output)
    keep, relabel = (record[record["design"] == design].set_index("method") for design in ("keep", "relabel"))
    assert set(keep.index) == {"datainf", "training_loss", "random", "oracle"}
    assert set(relabel.index) == {"datainf", "training_loss", "oracle"}
    assert keep.loc["oracle", "still_wrong"] == relabel.loc["oracle", "still_wrong"] == 0
    assert (record["accuracy_low"] <= record["accuracy_gain"]).all()
    bank = Bank.load(tmp_path / "banks" / "data_selection-it-r2-s0.parquet")
    assert len(bank) == len(record) and bank.losses.shape[1] == 12
    assert record["accuracy"].to_numpy() == pytest.approx(bank.right.mean(axis=1), abs=1e-5)
    # Three seeds of it make a table and a figure.
    seeds = pd.concat(
        [record.assign(seed=seed, accuracy_gain=record["accuracy_gain"] + seed / 100) for seed in (0, 1, 2)]
    )
    found = tables.gains(seeds)
    one = found[(found["design"] == "keep") & (found["method"] == "datainf")].iloc[0]
    assert one["seeds"] == 3 and one["accuracy_low"] < one["accuracy_gain"] < one["accuracy_high"]
    assert one["accuracy_gain"] == pytest.approx(keep.loc["datainf", "accuracy_gain"] + 0.01)
    assert tables.data_selection(found).map(lambda cell: not cell or "[" in cell).all(axis=None)
    assert len(plotting.by_share(found, "it").axes) == 4


def test_a_task_in_classes(tmp_path):
    output = tmp_path / "runs" / "data_selection-it-r2-s0.csv"
    run(NAME, **(FEW | TEXT), cache=str(tmp_path / "cache"), output=str(output))
    record = pd.read_csv(output)
    assert record.set_index("method")["groups_agreement"].notna().to_dict() == {
        "all": False,
        "datainf": True,
        "bm25": False,
    }
    assert tables.group_agreement(record).shape == (1, 1)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"n_unseen": 0}, "InputError: n_unseen must be 1 at least, not 0"),
        ({"shares": [], "relabel_shares": []}, "InputError: shares and relabel_shares are both empty"),
        ({"family": "images", "model": "demo-diffusion", "dataset": "demo-style"}, "judged by answers, which pictures"),
        ({"baselines": ["luck"]}, "InputError: There is no baseline 'luck' of this task"),
    ],
)
def test_what_does_not_fit_ends_in_one_sentence(given, sentence, tmp_path):
    assert_refused(sentence, NAME, tmp_path, **(FEW | given))
