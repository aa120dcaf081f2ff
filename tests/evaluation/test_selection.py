"""What is kept, relabelled and left out is what the scores say, and a model's worth is told as it is."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from datainf.data import glue
from datainf.errors import InputError
from datainf.evaluation import retraining, selection
from datainf.evaluation.retraining import Bank, bank
from datainf.models import classifier, losses
from datainf.models.forward import of_each
from datainf.models.lora import Recipe, retrain

HARM = np.array([0.5, -1.0, 3.0, 0.0, 2.0])


def test_the_least_harmful_are_kept():
    assert selection.keep(HARM, 0.6, "it").kept.tolist() == [True, True, False, True, False]
    assert selection.keep(HARM, 1.0, "it").kept.all()
    ties = selection.keep(np.zeros(5), 0.4, "it")
    assert ties.kept.tolist() == [True, True, False, False, False]


def test_the_most_harmful_are_relabelled():
    chosen = selection.relabel(HARM, 0.4, "it")
    assert (~chosen.kept).tolist() == [False, False, True, False, True]
    examples = Dataset.from_dict({"labels": [0, 1, 1, 0, 0], "x": list("abcde")})
    changed = selection.flip(examples, ~chosen.kept)
    assert changed["labels"][:] == [0, 1, 0, 0, 1] and changed["x"][:] == list("abcde")


def test_what_is_still_wrong():
    flipped = np.array([True, False, True, False, False])
    assert selection.still_wrong(selection.keep(HARM, 0.6, "it"), flipped) == pytest.approx(1 / 3)
    # One wrong label is mended, one right one spoilt, and one wrong one is left.
    assert selection.still_wrong(selection.relabel(HARM, 0.4, "it"), flipped) == pytest.approx(2 / 5)
    assert selection.still_wrong(selection.relabel(flipped.astype(float), 0.4, "oracle"), flipped) == 0


def test_each_group_is_left_out_whole():
    groups = ["a", "b/c", "a", "d", "b/c"]
    without = selection.without_groups(groups)
    assert [one.method for one in without] == ["a", "b/c", "d"]
    assert [(~one.kept).sum() for one in without] == [2, 2, 1]
    assert all("/" not in one.name for one in without) and len({one.name for one in without}) == 3


def test_a_groups_influence_is_the_sum_of_its_examples():
    scores = np.random.default_rng(0).normal(size=(7, 6))
    groups = np.array(["a", "b", "a", "b", "b", "c"])
    table = selection.of_groups(scores, groups).set_index("group")
    assert table["examples"].to_dict() == {"a": 2, "b": 3, "c": 1}
    for group in "abc":
        of_each = scores[:, groups == group].sum(axis=1)
        assert table.loc[group, "score"] == pytest.approx(of_each.mean())
        assert table.loc[group, "change_without"] == pytest.approx(-of_each.mean() / 6)
        # The bootstrap's interval of a mean is about that of its standard error.
        half = 1.96 * of_each.std() / np.sqrt(7)
        assert table.loc[group, "high"] - table.loc[group, "low"] == pytest.approx(2 * half, rel=0.15)


def made_up_bank(right):
    plan = [retraining.full(5), selection.keep(HARM, 0.6, "it"), selection.keep(HARM, 0.8, "it")]
    losses_of = np.array([[1.0, 2.0, 3.0, 4.0], [0.5, 1.5, 2.5, 3.5], [1.0, 2.0, 3.0, 8.0]])
    rows = pd.DataFrame([one.key for one in plan], columns=retraining.KEY)
    return Bank({}, rows, np.stack([one.kept for one in plan]), losses_of, right)


def test_worth_is_beside_the_model_of_all_data():
    right = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=bool)
    table = selection.worth(made_up_bank(right))
    assert table["accuracy_gain"].tolist() == [0, 0.25, -0.25] and table["loss_gain"].tolist() == [0, 0.5, -1]
    assert table["share"].tolist() == [1, 0.6, 0.8]
    # All losses fell by as much, so that there is no doubt; one alone rose, so that there is.
    assert table.loc[1, ["loss_low", "loss_high"]].tolist() == pytest.approx([0.5, 0.5])
    assert table.loc[2, "loss_low"] < -1 < table.loc[2, "loss_high"] == 0
    assert "accuracy" not in selection.worth(made_up_bank(None))
    with pytest.raises(InputError, match="no model that was fine-tuned on all examples"):
        selection.worth(made_up_bank(right).select(design="keep"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    task = glue.load("demo-reviews", n_train=24, n_validation=6, noise=0.25, seed=0)
    recipe = Recipe(epochs=2, batch_size=8, learning_rate=3e-3)
    return task, classifier.fine_tune("demo-roberta", task, recipe, folder=tmp_path_factory.mktemp("tuned"))


def test_a_relabelled_model_is_that_of_the_other_labels(tuned, tmp_path):
    task, model = tuned
    chosen = selection.relabel(task.flipped.astype(float), 0.25, "oracle")
    found = bank(
        [retraining.full(24), chosen, selection.keep(task.flipped.astype(float), 0.75, "oracle")],
        selection.outcomes(model, losses.classification, losses.right_label),
        {},
        tmp_path,
    )
    right_labels = glue.load("demo-reviews", n_train=24, n_validation=6, noise=0.0, seed=0).train["label"]
    examples = model.train.remove_columns("labels").add_column("labels", list(right_labels))
    again = retrain(replace(model.training, examples=examples), np.ones(24, dtype=bool))
    expected = of_each(again, model.query, losses.classification, model.collate)
    np.testing.assert_array_equal(found.losses[1], expected)
    assert not np.array_equal(found.losses[0], found.losses[1])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: selection.keep(HARM, 0.0, "it"), "A share of 0 of 5 examples is 0: it must be some of them"),
        (lambda: selection.relabel(HARM, 1.2, "it"), "A share of 1.2 of 5 examples is 6"),
        (lambda: selection.without_groups(["a", "a"]), "All examples are in one group, 'a'"),
        (
            lambda: selection.flip(Dataset.from_dict({"labels": [0, 2]}), np.array([True, False])),
            "Only a label of two can be changed",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
