"""The audits of adapters that others trained, in small."""

import json

import pandas as pd

from benchmarks import audits
from datainf import demo


def test_a_classifier_of_a_plain_loop_is_audited(tmp_path, monkeypatch):
    monkeypatch.setitem(audits.RECIPES, "labels", {"epochs": 1, "learning_rate": 2e-3, "batch_size": 16})
    for name in ("sst2", "qqp"):
        (tmp_path / name).mkdir()
    words = [f"this is a review of the film number {k}" for k in range(800)]
    table = pd.DataFrame({"sentence": words, "label": [k % 2 for k in range(800)]})
    table.to_csv(tmp_path / "sst2" / "train.tsv", sep="\t", index=False)
    questions = pd.DataFrame({"question1": [f"What is the number {k}?" for k in range(400)]})
    questions.to_csv(tmp_path / "qqp" / "train.tsv", sep="\t", index=False)
    given = ["labels", "--base", str(demo.BASE), "--data", str(tmp_path), "--orders", "0"]
    audits.main([*given, "--folder", str(tmp_path / "it"), "--output", str(tmp_path / "record.csv")])
    record = pd.read_csv(tmp_path / "record.csv").set_index("method")
    assert {"exact@training", "datainf", "training_loss", "cleanlab", "random"} <= set(record.index)
    assert record["found_in_top_tenth"].between(0, 1).all() and (record["n"] == 400).all()
    assert len(json.loads((tmp_path / "it" / "known_bad.json").read_text())) == 20
    assert len(pd.read_csv(tmp_path / "it" / "judge.csv")) == 300
