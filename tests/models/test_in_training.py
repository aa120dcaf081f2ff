"""Gradients recorded in training against those taken afterwards, of a model whose weights stay where they are."""

from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

import datainf
from datainf.data import glue, text
from datainf.errors import InputError
from datainf.models import causal_lm, classifier, lora, losses
from datainf.models.in_training import INDEX, RecordGradients
from datainf.models.lora import Recipe
from datainf.models.training import train

STILL = {"rank": 2, "dropout": 0.0, "batch_size": 8, "epochs": 2}
"""Dropout off; with a learning rate of 1e-12 all batches are of the same weights."""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A classifier and a language model, fine-tuned a little, since the gradient of lora_A is zero at first."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = Recipe(**STILL | {"epochs": 1}, learning_rate=3e-3)
    reviews = glue.load("demo-reviews", n_train=28, n_validation=4)
    sums = text.load("math_without_reasoning", n_train=2, n_test=1)
    of_llama = replace(recipe, targets=("q_proj", "v_proj"))
    return {
        "SEQ_CLS": (classifier.fine_tune("demo-roberta", reviews, recipe, folder=folder / "a"), losses.classification),
        "CAUSAL_LM": (causal_lm.fine_tune("demo-llama", sums, of_llama, folder=folder / "b"), losses.completion),
    }


def numbered(found) -> object:
    """The fine-tuning's training, of examples that know their numbers, with a learning rate of next to nothing."""
    examples = lora.with_column(found.training.examples, INDEX, list(range(len(found.train))))
    return replace(found.training, examples=examples, recipe=replace(found.training.recipe, learning_rate=1e-12))


@pytest.mark.parametrize("family", ["SEQ_CLS", "CAUSAL_LM"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_they_are_those_of_a_pass_afterwards(tuned, family, accumulate, epoch):
    found, loss_fn = tuned[family]
    training = numbered(found)
    training = replace(training, recipe=replace(training.recipe, accumulate=accumulate, epochs=2))
    recording = RecordGradients(len(found.train), epoch=epoch)
    train(found.model, training, None, callbacks=[recording])
    expected = datainf.per_sample_gradients(found.model, found.train, loss_fn, collate_fn=found.collate)
    assert recording.store.shapes == expected.shapes and set(recording.store) == set(expected)
    for name, gradients in expected.items():
        difference = (recording.store[name] - gradients).norm(dim=1)
        assert (difference <= 1e-4 * gradients.norm(dim=1) + 1e-6).all(), name


def test_training_is_what_it_would_be_without(tuned):
    found, _ = tuned["SEQ_CLS"]
    training = replace(numbered(found), recipe=Recipe(**STILL | {"dropout": 0.1}, learning_rate=3e-3))
    weights = []
    for callbacks in ([], [RecordGradients(len(found.train))]):
        model = lora.attach_adapter(training.load(), training.recipe, training.task_type)
        train(model, training, None, callbacks=callbacks)
        weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def of_trainer(found, folder, recording, **options):
    """The Trainer as a stranger has it."""
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-12} | options
    args = TrainingArguments(folder, remove_unused_columns=False, report_to="none", use_cpu=True, **options)
    examples = lora.with_column(found.train, INDEX, list(range(len(found.train))))
    return Trainer(found.model, args, found.collate, examples, callbacks=[recording])


def test_any_trainer_will_do(tuned, tmp_path):
    found, loss_fn = tuned["CAUSAL_LM"]
    recording = RecordGradients(len(found.train), layers="lora_B", dtype=torch.float64)
    of_trainer(found, tmp_path, recording, gradient_accumulation_steps=3).train()
    expected = datainf.per_sample_gradients(
        found.model, found.train, loss_fn, collate_fn=found.collate, layers="lora_B"
    )
    assert set(recording.store) == set(expected) and recording.store.dtype == torch.float64
    for name, gradients in expected.items():
        torch.testing.assert_close(recording.store[name].float(), gradients, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_recorded_is_refused(tuned, tmp_path):
    found, _ = tuned["SEQ_CLS"]
    n = len(found.train)
    with pytest.raises(InputError, match="There is no epoch 3 to record: the training has 1."):
        of_trainer(found, tmp_path, RecordGradients(n, epoch=3)).train()
    with pytest.raises(InputError, match="this training's is another"):
        found.model.config.problem_type, as_it_was = "multi_label_classification", found.model.config.problem_type
        try:
            one_hot = torch.eye(2)[torch.tensor(found.train["labels"])].tolist()
            several = replace(found, train=found.train.remove_columns("labels").add_column("labels", one_hot))
            of_trainer(several, tmp_path, RecordGradients(n)).train()
        finally:
            found.model.config.problem_type = as_it_was
    recording = RecordGradients(n)
    of_trainer(found, tmp_path, recording, dataloader_drop_last=True).train()
    with pytest.raises(InputError, match="The epoch left out 4 of 28 examples"):
        _ = recording.store
    with pytest.raises(InputError, match="of which no gradient was recorded"):
        _ = RecordGradients(n).store
