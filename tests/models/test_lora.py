"""Fine-tuning: learns, is repeatable, resumes, and refuses what it cannot do."""

from dataclasses import replace

import pytest
import torch

import datainf
from datainf import demo
from datainf.data import glue
from datainf.errors import InputError
from datainf.models import classifier, losses, training
from datainf.models.lora import Recipe
from datainf.study import results

SMALL = {"rank": 2, "learning_rate": 3e-3, "epochs": 3}


@pytest.fixture(scope="module")
def task():
    return glue.load("demo-reviews", n_train=64, n_validation=40)


def weights(tuned):
    return {name: p.detach().clone() for name, p in tuned.model.named_parameters() if p.requires_grad}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_same_call_gives_the_same_model_and_loads_what_is_there(task, tmp_path):
    first = classifier.fine_tune("demo-roberta", task, Recipe(**SMALL), folder=tmp_path / "a")
    again = classifier.fine_tune("demo-roberta", task, Recipe(**SMALL), folder=tmp_path / "b")
    other = classifier.fine_tune("demo-roberta", task, Recipe(**SMALL, seed=1), folder=tmp_path / "c")
    loaded = classifier.fine_tune("demo-roberta", task, Recipe(**SMALL), folder=tmp_path / "a")
    assert equal(weights(first), weights(again)) and not equal(weights(first), weights(other))
    assert equal(weights(first), weights(loaded))
    assert (
        list(first.history.columns) == ["step", "epoch", "loss", "query_loss", "accuracy"] and len(first.history) == 3
    )
    assert loaded.accuracy == pytest.approx(first.accuracy)
    assert first.revision == loaded.revision and first.revision.startswith("sha256:")
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_gradients_of_a_model_just_trained_are_those_of_the_model_loaded(task, tmp_path):
    """Two notebooks share a folder: the second finds the first one's gradients to be of the same model."""
    stores = []
    for _ in range(2):
        tuned = classifier.fine_tune("demo-roberta", task, Recipe(**SMALL | {"epochs": 1}, seed=5), folder=tmp_path)
        arguments = (tuned.model, tuned.train.select(range(6)), losses.classification)
        stores.append(datainf.per_sample_gradients(*arguments, collate_fn=tuned.collate, store=tmp_path / "train"))
    assert equal(*stores)


def test_killed_and_called_again_it_ends_with_the_same_weights(task, tmp_path, monkeypatch):
    whole = classifier.fine_tune("demo-roberta", task, Recipe(**SMALL), folder=tmp_path / "whole")

    def dies(self, args, state, control, **kwargs):
        if state.global_step == 5:  # two steps an epoch: in the middle of the third
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Progress, "on_step_end", dies)
        with pytest.raises(KeyboardInterrupt):
            classifier.fine_tune("demo-roberta", task, Recipe(**SMALL), folder=tmp_path / "cut")
    # What a kill in the middle of writing a checkpoint leaves behind.
    (tmp_path / "cut" / "checkpoints" / "checkpoint-99").mkdir()
    resumed = classifier.fine_tune("demo-roberta", task, Recipe(**SMALL), folder=tmp_path / "cut")
    assert equal(weights(resumed), weights(whole))
    assert resumed.history.equals(whole.history)


def test_a_folder_made_from_other_data_is_refused(task, tmp_path):
    classifier.fine_tune("demo-roberta", task, Recipe(**SMALL | {"epochs": 1}), folder=tmp_path)
    other = glue.load("demo-paraphrases", n_train=64, n_validation=40)
    with pytest.raises(InputError, match="another data: delete that folder"):
        classifier.fine_tune("demo-roberta", other, Recipe(**SMALL | {"epochs": 1}), folder=tmp_path)


def test_a_folder_made_by_another_recipe_is_refused(task, tmp_path):
    classifier.fine_tune("demo-roberta", task, Recipe(**SMALL | {"epochs": 1}), folder=tmp_path)
    with pytest.raises(InputError, match="another recipe: delete that folder"):
        classifier.fine_tune("demo-roberta", task, Recipe(**SMALL | {"epochs": 2}), folder=tmp_path)


def test_a_base_in_the_hubs_format(task, tmp_path):
    """What the hub serves is a folder like this one: another architecture, its own tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    config = BertConfig(
        vocab_size=3000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(demo.BASES["demo-roberta"]).save_pretrained(tmp_path / "base")
    tuned = classifier.fine_tune(str(tmp_path / "base"), task, Recipe(**SMALL | {"epochs": 1}), folder=tmp_path / "run")
    arguments = (tuned.model, tuned.train.select(range(8)), losses.classification)
    store = datainf.per_sample_gradients(*arguments, collate_fn=tuned.collate)
    assert store.n == 8 and len(store) == 2 * 2 + 1


def test_after_bfloat16_training_gradients_are_float32(task, tmp_path):
    tuned = classifier.fine_tune("demo-roberta", task, Recipe(**SMALL | {"epochs": 1}, bf16=True), folder=tmp_path)
    arguments = (tuned.model, tuned.train.select(range(6)), losses.classification)
    fast = datainf.per_sample_gradients(*arguments, collate_fn=tuned.collate)
    slow = datainf.reference_gradients(*arguments, collate_fn=tuned.collate)
    assert max(((fast[n] - slow[n]).norm() / slow[n].norm()).item() for n in slow) <= 1e-5


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a processor; an accelerator decides for itself")
def test_a_processor_without_bfloat16_fine_tunes_in_float32_and_the_record_says_so(task, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_cpu_has_bfloat16", lambda: False)
    recipe = Recipe(**SMALL | {"epochs": 1}, bf16=True)
    with pytest.warns(UserWarning, match="fine-tuning in float32"):
        asked = classifier.fine_tune("demo-roberta", task, recipe, folder=tmp_path / "asked")
    plain = classifier.fine_tune("demo-roberta", task, replace(recipe, bf16=False), folder=tmp_path / "plain")
    assert equal(weights(asked), weights(plain))
    run = {"model": "demo-roberta", "bf16": True}
    assert not results.run_facts(run, "approximation_error", task=task, tuned=asked, n_layers=1)["bf16"]


def test_bad_input_is_named_in_one_sentence(task, tmp_path):
    def refused(message, base="demo-roberta", **arguments):
        with pytest.raises(InputError, match=message) as caught:
            classifier.fine_tune(base, task, Recipe(**SMALL | arguments), folder=tmp_path / "run")
        assert "\n" not in str(caught.value)

    refused("rank must be a whole number of at least 1, not 0", rank=0)
    refused("epochs must be", epochs=0)
    refused("learning_rate must be positive", learning_rate=0.0)
    refused("There is no folder ./nowhere", base="./nowhere")
    refused("'no-such-model' can be loaded neither", base="no-such-model")
    refused("cannot carry a LoRA adapter on c_attn", targets=["c_attn"])


def test_real_minilm(real_models, real_data, tmp_path):
    """A real encoder on real data: the hooks equal the loop, and fine-tuning moves the loss."""
    task = glue.load(str(real_data / "glue" / "sst2"), n_train=32, n_validation=16)
    base = str(real_models / "all-MiniLM-L6-v2")
    tuned = classifier.fine_tune(base, task, Recipe(rank=2, epochs=1), folder=tmp_path)
    arguments = (tuned.model, tuned.train.select(range(6)), losses.classification)
    fast = datainf.per_sample_gradients(*arguments, collate_fn=tuned.collate)
    slow = datainf.reference_gradients(*arguments, collate_fn=tuned.collate)
    assert max(((fast[n] - slow[n]).norm() / slow[n].norm()).item() for n in slow) <= 1e-5
    assert len(fast) == 6 * 2 + 1


def test_a_batch_in_parts_is_the_same_fine_tuning(task, tmp_path):
    plain = SMALL | {"dropout": 0.0}
    whole = classifier.fine_tune("demo-roberta", task, Recipe(**plain), folder=tmp_path / "whole")
    parts = classifier.fine_tune("demo-roberta", task, Recipe(**plain, accumulate=2), folder=tmp_path / "parts")
    moved = classifier.fine_tune("demo-roberta", task, Recipe(**plain | {"batch_size": 8}), folder=tmp_path / "moved")

    def apart(tuned):
        return (tuned.history[["loss", "query_loss"]] / whole.history[["loss", "query_loss"]] - 1).abs().max(axis=None)

    assert apart(parts) < 1e-3 < 1e-2 < apart(moved)  # Adam makes much of the rounding of gradients that are near zero
    with pytest.raises(InputError, match="accumulate must divide batch_size, 16, which 3 does not"):
        Recipe(batch_size=16, accumulate=3)
