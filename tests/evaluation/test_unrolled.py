"""The derivative through a fine-tuning, against fine-tunings with other weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datainf.data import glue, images, text
from datainf.errors import InputError
from datainf.evaluation.unrolled import unrolled
from datainf.models import causal_lm, classifier, diffusion, lora, losses, trajectory
from datainf.models.lora import Recipe
from datainf.models.training import Training

N = 24
FINE, COARSE = 2**-13, 2**-7  # how far a weight is changed; 1 + that is a float32 number, as weights are


def in_double(training: Training) -> Training:
    return replace(training, load=lambda: training.load().double())


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    """A classifier, dropout and clipping among its recipe's parts, and what it was made by, in float64."""
    task = glue.load("demo-reviews", n_train=N, n_validation=6, noise=0.2, seed=0)
    recipe = Recipe(epochs=2, learning_rate=0.003, batch_size=8)
    tuned = classifier.fine_tune("demo-roberta", task, recipe, folder=tmp_path_factory.mktemp("classifier"))
    return tuned, in_double(tuned.training)


@pytest.fixture(scope="module")
def recorded(classification):
    return trajectory.record(classification[1])


def loss_with(training: Training, weights: np.ndarray, queries, loss_fn, collate) -> np.ndarray:
    """The queries' losses after a fine-tuning by weighted losses."""
    again = replace(
        training,
        examples=lora.with_column(training.examples, losses.WEIGHT, weights.tolist()),
        loss=losses.weighted(training.loss or losses.OF_TRAINING[training.task_type]),
    )
    model = lora.retrain(again, np.ones(len(weights), dtype=bool))
    with torch.no_grad():
        return np.array([loss_fn(model, collate([query])).item() for query in queries])


def difference_quotient(training: Training, example: int, by: float, *queries) -> np.ndarray:
    """n times what a query's loss changes by for one example's weight, from two fine-tunings."""
    n = len(training.examples)
    either = []
    for sign in (1, -1):
        weights = np.ones(n)
        weights[example] += sign * by
        either.append(loss_with(training, weights, *queries))
    return n * (either[0] - either[1]) / (2 * by)


@pytest.mark.parametrize(("adam_epsilon", "tolerance"), [(1e-8, 1e-2), (1e-3, 1e-5)])
def test_it_is_the_limit_of_retrainings(classification, adam_epsilon, tolerance):
    """Of the mean query and of each, for the example that matters most."""
    tuned, training = classification
    training = replace(training, recipe=replace(training.recipe, adam_epsilon=adam_epsilon))
    recorded, queries = trajectory.record(training), (tuned.query, losses.classification)
    of_each = unrolled(recorded, *queries, collate_fn=tuned.collate)
    of_mean = unrolled(recorded, *queries, collate_fn=tuned.collate, mean=True)
    torch.testing.assert_close(of_mean[0], of_each.mean(dim=0))
    example = int(of_mean.abs().argmax())
    expected = difference_quotient(training, example, FINE, *queries, tuned.collate)
    assert np.linalg.norm(of_each[:, example].numpy() - expected) <= tolerance * np.linalg.norm(expected)


def test_the_recorded_fine_tuning_is_the_one_that_retrain_does(classification, recorded):
    _, training = classification
    model = lora.retrain(training, np.ones(N, dtype=bool), same_batches=True)
    expected = trajectory.flat([each for each in model.parameters() if each.requires_grad])
    assert torch.equal(recorded.final[0], expected)
    assert [step.number for step in recorded.steps] == [1, 2, 3, 4, 5, 6]
    for epoch in (recorded.steps[:3], recorded.steps[3:]):
        assert sorted(example for step in epoch for example in step.examples) == list(range(N))


def test_the_model_is_left_as_it_was_at_the_end(classification, recorded):
    tuned, _ = classification
    unrolled(recorded, tuned.query.select([0]), losses.classification, collate_fn=tuned.collate)
    now = trajectory.flat([each.detach() for each in recorded.parameters.values()])
    assert torch.equal(now, recorded.final[0]) and not recorded.model.training


def test_of_a_language_model(tmp_path):
    """Whose loss is divided by a batch's tokens. It normalizes in float32 whatever its weights are, and Adam with its
    usual epsilon would make a difference of rounding into one of whole steps."""
    task = text.load("math_without_reasoning", n_train=2, n_test=1, seed=0)
    recipe = Recipe(
        rank=2, alpha=32, targets=("q_proj", "v_proj"), epochs=1, learning_rate=0.003, adam_epsilon=0.01, batch_size=8
    )
    tuned = causal_lm.fine_tune("demo-llama", task, recipe, folder=tmp_path)
    training, queries = in_double(tuned.training), tuned.query.select([0, 5])
    found = unrolled(trajectory.record(training), queries, losses.completion, collate_fn=tuned.collate)
    example = int(found.abs().sum(dim=0).argmax())
    expected = difference_quotient(training, example, COARSE, queries, losses.completion, tuned.collate)
    assert np.linalg.norm(found[:, example].numpy() - expected) <= 1e-3 * np.linalg.norm(expected)


def test_of_a_diffusion_model(tmp_path):
    """In float32, in which its noise is drawn."""
    task = images.load("demo-style", n_train=3, n_test=1, size=32)
    recipe = Recipe(rank=1, dropout=0.0, targets=("to_q", "to_out.0"), steps=4, batch_size=4)
    tuned = diffusion.fine_tune("demo-diffusion", task, recipe, folder=tmp_path)
    found = unrolled(trajectory.record(tuned.training), [tuned.query[0]], losses.denoising, collate_fn=tuned.collate)
    assert found.shape == (1, len(tuned.train)) and found.isfinite().all() and found.any()


def test_refusals(classification, recorded):
    tuned, training = classification
    with pytest.raises(InputError, match="There are no queries"):
        unrolled(recorded, [], losses.classification, collate_fn=tuned.collate)
    for more in ({"accumulate": 2}, {"bf16": True}):
        with pytest.raises(InputError, match="set accumulate=1, bf16=False"):
            trajectory.record(replace(training, recipe=replace(training.recipe, **more)))
    steps = list(recorded.steps)
    steps[4] = replace(steps[4], state=steps[3].state)
    with pytest.raises(InputError, match=r"Step 5 of the fine-tuning leads elsewhere when it is taken again \(by \d+%"):
        unrolled(replace(recorded, steps=steps), tuned.query, losses.classification, collate_fn=tuned.collate)
