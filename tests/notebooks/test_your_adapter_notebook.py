"""Notebook 80 on its own example, on a classifier's adapter from files, by make audit, and what it refuses."""

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from running import assert_refused, execute
from transformers import AutoModelForSequenceClassification

from datainf.data import glue
from datainf.demo import BASES
from datainf.study.audit.__main__ import main
from datainf.study.provenance import ROOT

NAME = "80_your_adapter"


def test_the_example(tmp_path):
    execute(
        NAME, tmp_path, cache=str(tmp_path / "cache"), report=str(tmp_path / "report"), folder=str(tmp_path / "results")
    )
    ranked = pd.read_csv(tmp_path / "report" / "ranked.csv")
    assert len(ranked) == 200 and (ranked["score"].diff().dropna() <= 0).all()
    assert len((tmp_path / "report" / "suspects.jsonl").read_text().splitlines()) == 10
    assert len((tmp_path / "report" / "filtered.jsonl").read_text().splitlines()) == 190
    record = pd.read_csv(tmp_path / "results" / "runs" / "your_adapter.csv").set_index("method")
    assert record.loc["exact@training", "found_in_top_tenth"] >= 0.5  # chance: 0.1
    assert record["auc"].between(0, 1).all() and {"training_loss", "bm25", "random"} <= set(record.index)


@pytest.fixture
def files(tmp_path):
    """A classifier's adapter as plain PEFT saves it, and its files."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(BASES["demo-roberta"], num_labels=2, dtype=torch.float32)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["value"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    task = glue.load("demo-reviews", n_train=24, n_validation=8)
    for name, split in (("train", task.train), ("queries", task.validation)):
        split.to_csv(tmp_path / f"{name}.csv")
    return {
        "adapter": str(tmp_path / "adapter"),
        **{name: str(tmp_path / f"{name}.csv") for name in ("train", "queries")},
    }


def test_a_classifier_by_make_audit_with_retraining(files, tmp_path):
    environment = os.environ | {name.upper(): path for name, path in files.items()}
    environment |= {
        "OUT": str(tmp_path / "out"),
        "AUDIT": "{epochs: 1, learning_rate: 3e-3, seeds: 2, cache: %s}" % (tmp_path / "c"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "datainf.study.audit"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(
            "notebook.ipynb",
            "notebook.html",
            "ranked.csv",
            "scores.npy",
            "suspects.jsonl",
            "retrained.csv",
            "report.html",
        )
    }
    assert "WARNING: With the adapter the mean training loss is" in done.stdout  # it was never trained
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Does the model get better without the suspects?" in page and "Warning" in page
    assert "How well each label is fitted" in page and "queries harmed, of 4" in page
    assert json.loads((tmp_path / "out" / "suspects.jsonl").read_text().splitlines()[0]).keys() == {
        "sentence",
        "label",
        "influence",
    }


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"queries": ""}, "InputError: adapter, train and queries go together"),
        ({"epochs": 2}, "InputError: epochs and learning_rate go together"),
        ({"seeds": 1}, "InputError: To train again, the recipe must be known"),
        ({"method": "exact@training"}, "InputError: exact@training needs the recipe"),
        ({"adapter": "./nowhere"}, "InputError: There is no adapter in"),
        ({"base": "./nowhere"}, "InputError: There is no folder ./nowhere"),
        ({"train": "./nowhere.jsonl"}, "InputError: There is no file or folder ./nowhere.jsonl"),
        ({"text_columns": ["words"]}, "InputError: The training file has no column 'words'"),
        ({"suspects": 24}, "InputError: suspects must be fewer than the 24 training examples"),
        ({"template": "xml"}, "InputError: template must be one of"),
    ],
)
def test_what_does_not_fit_ends_in_one_sentence(files, given, sentence, tmp_path):
    assert_refused(sentence, NAME, tmp_path, **(files | given))


def test_make_audit_says_what_is_missing(monkeypatch):
    for environment, sentence in (
        ({"ADAPTER": "x"}, "Name TRAIN and QUERIES: make audit ADAPTER=folder"),
        (
            {"ADAPTER": "x", "TRAIN": "y", "QUERIES": "z", "AUDIT": "{speed: 1}"},
            "AUDIT names 'speed', which is no parameter",
        ),
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match=re.escape(sentence)):
            main()
