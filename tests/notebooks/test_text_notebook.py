"""Notebook 30 by itself: what a user is refused, and the configurations of the larger scales on a small checkpoint."""

import pandas as pd
import pytest
import torch
from running import assert_refused, of_scale, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from datainf import demo

NAME = "30_text_identification"
SMALLEST = {"task": "math_without_reasoning", "n_train": 4, "n_test": 2, "epochs": 1}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"task": "sentence_transformation"}, "InputError: There is no task 'sentence_transformation', neither"),
        ({"loss": "response"}, "InputError: Unknown loss 'response': choose one of completion"),
        ({"max_length": 20}, "and the context holds 20: shorten it"),
        ({"preamble": 300 * "word "}, "and the context holds 256: shorten it"),
        ({"adapter": "./nothing"}, "InputError: There is no adapter in ./nothing"),
        ({"alpha": -1}, "InputError: alpha must be a whole number of at least 0, not -1."),
    ],
)
def test_what_does_not_fit_a_text_run_ends_at_once_in_one_sentence(given, sentence, tmp_path):
    assert_refused(sentence, NAME, tmp_path, **(SMALLEST | given))


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_text_notebook_of_a_scale_runs_on_a_checkpoint_in_the_hubs_format(scale, tmp_path):
    """As config/SCALE.yaml has it, but for the base, the number of examples and, where there is no GPU, 8 bits."""
    base = str(tmp_path / "base")
    AutoTokenizer.from_pretrained(demo.LLAMA).save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(demo.LLAMA, dtype="float32").save_pretrained(base)
    config = of_scale(scale, "text")
    given = {"n_train": 3, "n_test": 1, "epochs": 1, "output": str(tmp_path / "run.csv"), "cache": str(tmp_path / "c")}
    if not torch.cuda.is_available():
        given["quantization"] = ""
    run(NAME, **(config | {"model": base} | given))
    record = pd.read_csv(tmp_path / "run.csv")
    assert set(record["loss"]) == {"completion", "as_published", "common_preamble"} and record[
        "model"
    ].unique().tolist() == ["base"]
    assert record["learning_rate"].unique().tolist() == [config["learning_rate"]]
