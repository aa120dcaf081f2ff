"""Retraining: nothing else changes, and a bank is what its retrainings gave, however its making was interrupted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datainf import processes
from datainf.data import glue, images, text
from datainf.errors import InputError
from datainf.evaluation import retraining
from datainf.evaluation.retraining import OWN, SAME, Bank, Retraining, bank
from datainf.models import causal_lm, classifier, diffusion, losses
from datainf.models.lora import Recipe, retrain

SCRIPT = Path(__file__).parents[1] / "scripts" / "bank.py"


def classifier_of(folder, **recipe):
    task = glue.load("demo-reviews", n_train=24, n_validation=6, noise=0.2, seed=0)
    return classifier.fine_tune("demo-roberta", task, Recipe(epochs=2, batch_size=8, **recipe), folder=folder)


def llama_of(folder):
    task = text.load("sentence_transformations", n_train=2, n_test=1)
    recipe = Recipe(targets=("q_proj", "v_proj"), epochs=2, batch_size=8, learning_rate=0.01)
    return causal_lm.fine_tune("demo-llama", task, recipe, folder=folder)


def unet_of(folder):
    task = images.load("demo-style", n_train=3, n_test=1, size=32)
    return diffusion.fine_tune("demo-diffusion", task, Recipe(targets=("to_q",), steps=5, batch_size=4), folder=folder)


FAMILIES = {"classifier": classifier_of, "llama": llama_of, "unet": unet_of}


@pytest.fixture(scope="module", params=FAMILIES)
def tuned(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def apart(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_with_all_examples_it_is_the_same_model(tuned):
    everyone = np.ones(len(tuned.training.examples), dtype=bool)
    assert apart(weights(retrain(tuned.training, everyone)), weights(tuned.model)) == 0
    # Another way to compute the same loss, which rounds otherwise.
    assert apart(weights(retrain(tuned.training, everyone, same_batches=True)), weights(tuned.model)) < 1e-4


def test_in_the_same_batches_only_the_weights_change(tuned):
    kept = np.arange(len(tuned.training.examples)) % 3 > 0
    found = weights(retrain(tuned.training, kept, same_batches=True))
    assert apart(found, weights(tuned.model)) > 1e-3
    assert apart(found, weights(retrain(tuned.training, kept))) > 1e-3
    assert apart(found, weights(retrain(tuned.training, kept, same_batches=True))) == 0


def test_another_order_is_another_model_of_the_same_beginning(tuned):
    everyone = np.ones(len(tuned.training.examples), dtype=bool)
    assert apart(weights(retrain(tuned.training, everyone, order=7)), weights(tuned.model)) > 1e-3
    slow = replace(tuned.training, recipe=replace(tuned.training.recipe, learning_rate=1e-12))
    first, other = (weights(retrain(slow, everyone, order=order)) for order in (None, 7))
    assert apart(first, other) < 1e-9


def test_who_is_left_out_has_no_say(tmp_path):
    """The labels of those who are left out are turned round, and nothing changes."""
    tuned = classifier_of(tmp_path)
    kept = np.arange(24) % 2 > 0
    labels = [label if keep else 1 - label for label, keep in zip(tuned.train["labels"], kept, strict=True)]
    turned = replace(tuned.training, examples=tuned.train.remove_columns("labels").add_column("labels", labels))
    for same in (False, True):
        one, other = (weights(retrain(each, kept, same_batches=same)) for each in (tuned.training, turned))
        assert apart(one, other) == 0


def test_batches_of_their_own_are_a_fine_tuning_of_the_kept(tmp_path):
    task = glue.load("demo-reviews", n_train=24, n_validation=6, noise=0.2, seed=0)
    kept = np.arange(24) % 2 > 0
    half = replace(task, train=task.train.select(np.flatnonzero(kept)), flipped=task.flipped[kept], revision="half")
    recipe = Recipe(epochs=2, batch_size=8, bf16=True)
    whole, alone = (
        classifier.fine_tune("demo-roberta", each, recipe, folder=tmp_path / name)
        for name, each in (("whole", task), ("half", half))
    )
    assert apart(weights(retrain(whole.training, kept)), weights(alone.model)) == 0


def test_values_are_of_the_queries_in_their_order(tuned):
    loss_fn, right_fn = {
        "RobertaForSequenceClassification": (losses.classification, losses.right_label),
        "LlamaForCausalLM": (losses.completion, losses.right_response),
        "UNet2DConditionModel": (losses.denoising, None),
    }[type(tuned.model.get_base_model()).__name__]
    everyone = Retraining(np.ones(len(tuned.training.examples), dtype=bool), "full")
    found, right = retraining.outcomes(tuned, loss_fn, right_fn, batch_size=4)(everyone)
    tuned.model.eval()
    with torch.no_grad():
        batches = [tuned.collate([tuned.query[index]]) for index in range(len(tuned.query))]
        expected = torch.cat([loss_fn(tuned.model, batch) for batch in batches])
        answers = None if right_fn is None else torch.cat([right_fn(tuned.model, batch) for batch in batches])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.dtype == np.float32
    assert right is None if answers is None else np.array_equal(right, answers)


def test_right_responses_are_those_that_the_model_gives(tmp_path):
    tuned = llama_of(tmp_path)
    model, own, changed = tuned.model.eval(), [], []
    for row in tuned.query:
        start = row["labels"].count(losses.IGNORED)
        ids = row["input_ids"][:start]
        for _ in range(12):  # what it says, a token at a time
            with torch.no_grad():
                ids = [*ids, model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
        said = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [losses.IGNORED] * start + ids[start:]}
        own.append(said)
        other = [*ids[:-3], (ids[-3] + 1) % 100, *ids[-2:]]
        changed.append(said | {"input_ids": other, "labels": [losses.IGNORED] * start + other[start:]})
    with torch.no_grad():
        assert losses.right_response(model, tuned.collate(own)).all()
        assert not losses.right_response(model, tuned.collate(changed)).any()
        left = causal_lm._pad_left([row["input_ids"] for row in own], tuned.tokenizer)
        width = left["input_ids"].shape[1]
        labels = torch.tensor([[losses.IGNORED] * (width - len(row["labels"])) + row["labels"] for row in own])
        assert losses.right_response(model, left | {"labels": labels}).all()


# --- Banks, of a model whose retraining takes no time ----------------------------------------------------------------

N, M = 40, 5
ABOUT = {"task": "ridge", "recipe": {"epochs": 3}}


def ridge(one: Retraining):
    rng = np.random.default_rng(0)
    X, y, Q = rng.standard_normal((N, 3)), rng.standard_normal(N), rng.standard_normal((M, 3))
    X, y = X[one.kept], y[one.kept] + 0.01 * max(one.order, 0)
    losses = (Q @ np.linalg.solve(X.T @ X + np.eye(3), X.T @ y)) ** 2
    return losses.astype("float32"), losses < 0.1


def plan_of(count=12):
    return [
        retraining.full(N),
        *retraining.repeats(retraining.subsets(N, 0.5, 3)),
        *retraining.subsets(N, 0.5, count),
        *retraining.subsets(N, 0.05, count, batches=SAME),
        *retraining.leave_one_out(N, [3, 7]),
        retraining.without_top(np.arange(N) - 5.0, 0.05, "datainf"),
    ]


def same(one: Bank, other: Bank) -> bool:
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("kept", "losses", "right"))
    return equal and one.rows.equals(other.rows) and one.about == other.about


def test_a_bank_is_what_its_retrainings_gave(tmp_path):
    plan = plan_of()
    found = bank(plan, ridge, ABOUT, tmp_path / "parts", facts={"commit": "abc"})
    found.save(tmp_path / "bank.parquet")
    again = Bank.load(tmp_path / "bank.parquet")
    assert same(found, again) and len(again) == len(plan)
    for at, one in enumerate(plan):
        assert np.array_equal(again.kept[at], one.kept)
        assert np.array_equal(again.losses[at], ridge(one)[0]) and np.array_equal(again.right[at], ridge(one)[1])
    assert set(again.rows["commit"]) == {"abc"}
    assert len(again.select(design="subset", batches=OWN)) == 12
    (top,) = again.select(design="without_top").kept
    assert np.flatnonzero(~top).tolist() == [0, 1]  # the most helpful, whose scores are the lowest
    other = retraining.without_top(5.0 - np.arange(N), 0.05, "datainf")  # by scores that have changed
    assert len(bank([other], ridge, ABOUT, tmp_path / "parts")) == 1
    assert (again.select(design="leave_one_out").rows["number"] == [3, 7]).all()


def test_a_bank_without_answers(tmp_path):
    found = bank(plan_of(), lambda one: (ridge(one)[0], None), ABOUT, tmp_path)
    found.save(tmp_path / "bank.parquet")
    assert Bank.load(tmp_path / "bank.parquet").right is None


def test_a_longer_plan_begins_as_a_shorter_one():
    long, short = (retraining.subsets(N, 0.5, count) for count in (20, 5))
    assert all(np.array_equal(a.kept, b.kept) for a, b in zip(long, short, strict=False))
    assert len({one.kept.tobytes() for one in long}) == 20
    assert all((~one.kept).sum() == N / 2 for one in long)
    for a, b in zip(short, retraining.subsets(N, 0.5, 5, batches=SAME), strict=True):
        assert np.array_equal(a.kept, b.kept)  # so that the two kinds of batches are compared in pairs
    for share in (0.0, 0.001, 1.0):
        with pytest.raises(InputError, match="it must leave out some, not all"):
            retraining.subsets(N, share, 1)


def test_what_is_done_is_not_done_again(tmp_path):
    calls = []

    def counted(one):
        calls.append(one.name)
        return ridge(one)

    whole = bank(plan_of(), counted, ABOUT, tmp_path / "one")
    assert len(calls) == len(set(calls)) == len(plan_of())
    assert same(bank(plan_of(), counted, ABOUT, tmp_path / "one"), whole) and len(calls) == len(plan_of())
    # A bank from elsewhere, and a longer plan.
    longer = bank(plan_of(15), counted, ABOUT, tmp_path / "other", known=whole)
    assert len(calls) == len(plan_of(15)) and len(longer) == len(plan_of(15))
    # In parts, of which each does its own.
    calls.clear()
    for k in range(3):
        bank(plan_of(), counted, ABOUT, tmp_path / "parts", part=(k, 3))
    assert len(calls) == len(set(calls)) == len(plan_of())
    assert same(bank(plan_of(), counted, ABOUT, tmp_path / "parts"), whole)


def test_another_bank_is_refused(tmp_path):
    found = bank(plan_of(), ridge, ABOUT, tmp_path / "parts")
    other = ABOUT | {"recipe": {"epochs": 4}}
    sentence = r"The bank is of another recipe: \{'epochs': 3\}, not \{'epochs': 4\}"
    for call in (
        lambda: found.check(other),
        lambda: bank(plan_of(), ridge, other, tmp_path / "parts"),
        lambda: bank(plan_of(), ridge, other, tmp_path / "new", known=found),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
    with pytest.raises(InputError, match="left out others than the plan does"):
        bank([replace(one, kept=np.roll(one.kept, 1)) for one in plan_of()], ridge, ABOUT, tmp_path / "parts")
    with pytest.raises(InputError, match="There is no bank .*missing"):
        Bank.load(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(InputError, match="text.parquet is no bank of retrainings"):
        Bank.load(tmp_path / "text.parquet")
    with pytest.raises(InputError, match="none of it is done"):
        bank([], ridge, ABOUT, tmp_path / "nothing")


def test_what_cannot_be_retrained_is_refused(tmp_path, monkeypatch):
    tuned = replace(classifier_of(tmp_path), training=None)
    with pytest.raises(InputError, match="fine-tune it here to retrain it"):
        retraining.outcomes(tuned, losses.classification)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="shared out by part="):
        patch.setattr(processes, "rank_and_count", lambda: (0, 2))
        retraining.outcomes(tuned, losses.classification)
    with pytest.raises(InputError, match="No example is kept"):
        retrain(classifier_of(tmp_path).training, np.zeros(24, dtype=bool))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_bank_that_was_killed_ten_times_is_as_if_nothing_had_happened(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout)
    assert seen["kills"] == 10
    assert seen["after_each"] == sorted(seen["after_each"]) and 0 < seen["after_each"][-1] < seen["plan"]
    assert seen["same_bytes"]
    assert not list((tmp_path / "killed" / "parts").glob(".*.part"))
