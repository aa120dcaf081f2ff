"""Baselines: each against its definition, and all with the study's sign."""

import numpy as np
import pytest
import torch
from cleanlab.rank import get_normalized_margin_for_each_label

import datainf
from datainf.data import glue
from datainf.evaluation import baselines, metrics
from datainf.models import classifier, losses
from datainf.models.forward import of_each
from datainf.models.lora import Recipe


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    task = glue.load("demo-reviews", n_train=60, n_validation=8, noise=0.2, seed=0)
    recipe = Recipe(epochs=3, batch_size=8, learning_rate=3e-3)
    return task, classifier.fine_tune("demo-roberta", task, recipe, folder=tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def gradients(tuned):
    _, model = tuned
    return [
        datainf.per_sample_gradients(model.model, each, losses.classification, collate_fn=model.collate)
        for each in (model.train, model.query)
    ]


def test_gradient_cosine_is_of_the_whole_gradients(gradients):
    G, V = (torch.cat([store[name] for name in store], dim=1).double() for store in gradients)
    expected = -torch.nn.functional.cosine_similarity(V[:, None], G[None], dim=2)
    np.testing.assert_allclose(baselines.gradient_cosine(*gradients), expected, atol=1e-5)


def test_self_influence_is_large_of_what_is_fitted_by_itself(gradients):
    found = baselines.self_influence(gradients[0])
    assert found.shape == (60,) and (found >= 0).all()
    np.testing.assert_allclose(found, -datainf.self_influence(gradients[0]), rtol=1e-6)


def test_hidden_states_are_means_over_tokens_without_padding(tuned):
    _, model = tuned
    network = model.model.eval()
    found = of_each(network, model.query, baselines.mean_hidden_state, model.collate, batch_size=4)
    with torch.no_grad():
        for row, state in zip(model.query, found, strict=True):
            output = network(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
            np.testing.assert_allclose(state, output.hidden_states[-1][0].mean(dim=0), atol=1e-5)
    scores = baselines.hidden_state_similarity(network, model.query, model.query, model.collate)
    np.testing.assert_allclose(np.diag(scores), -1, atol=1e-6)
    assert (scores.argmin(axis=1) == np.arange(8)).all()


def test_words_find_the_text_itself():
    texts = ["the cat sat on the mat", "a dog barked at night", "prices rose again in march", "the cat slept"]
    for similarity in (baselines.bm25, baselines.tfidf):
        scores = similarity(texts, texts)
        assert scores.shape == (4, 4) and (scores <= 0).all()
        assert (scores.argmin(axis=1) == np.arange(4)).all()
        assert scores[0, 3] < scores[0, 2] == 0  # a cat in both; no word in common
    assert (baselines.bm25(texts, ["unheard of words xyz", ""]) == 0).all()


def test_bm25_is_its_formula():
    """Lucene's variant, by the definition."""
    texts, k1, b = ["a b b c", "b d", "e f g h e"], 1.5, 0.75
    words = [text.split() for text in texts]
    mean = np.mean([len(each) for each in words])
    query = ["b", "e"]
    expected = np.zeros(3)
    for word in query:
        holding = sum(word in each for each in words)
        idf = np.log(1 + (3 - holding + 0.5) / (holding + 0.5))
        for place, each in enumerate(words):
            count = each.count(word)
            expected[place] += idf * count / (count + k1 * (1 - b + b * len(each) / mean))
    long = {letter: f"word{letter}" for letter in "abcdefgh"}  # words of one letter are no words to it
    told = [" ".join(long[word] for word in each) for each in words]
    np.testing.assert_allclose(-baselines.bm25(told, [" ".join(long[word] for word in query)])[0], expected, rtol=1e-5)


def test_cleanlab_suspects_the_flipped(tuned):
    task, model = tuned
    labels = np.array(model.train["labels"])
    probabilities = of_each(model.model.eval(), model.train, baselines.probabilities, model.collate)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    found = baselines.cleanlab(labels, probabilities)
    np.testing.assert_allclose(found, 1 - get_normalized_margin_for_each_label(labels, probabilities), rtol=1e-6)
    assert metrics.detection_auc(found, task.flipped) > 0.8


def test_out_of_sample_no_example_speaks_of_itself(tuned):
    task, model = tuned
    found = baselines.out_of_sample(model.training, folds=3)
    labels = np.array(model.train["labels"])
    assert found.shape == (60, 2)
    assert metrics.detection_auc(baselines.cleanlab(labels, found), task.flipped) > 0.7
    inside = of_each(model.model.eval(), model.train, baselines.probabilities, model.collate)
    own = np.arange(60), labels
    assert found[own][task.flipped].mean() < inside[own][task.flipped].mean() + 0.02


def test_chance_and_what_is_said_of_examples_alone():
    assert np.array_equal(baselines.random(3, 5, seed=1), baselines.random(3, 5, seed=1))
    assert abs(baselines.random(50, 200).mean()) < 0.05
    assert baselines.of_examples(np.arange(4), 3).tolist() == [[0, 1, 2, 3]] * 3


def test_what_is_said_of_examples_is_the_same_in_training_and_evaluation(tuned, gradients):
    """A fine-tuned model comes with its adapter's dropout on; nothing that is said of it is drawn by chance."""
    _, model = tuned
    found = []
    for training in (True, False):
        model.model.train(training)
        suspicions = baselines.suspicions(model, gradients[0], losses.classification, labelled=True)
        found.append({name: suspicion() for name, suspicion in suspicions.items()})
        assert all(module.training == training for module in model.model.modules())
    assert set(found[0]) == {"training_loss", "self_influence", "cleanlab"}
    for name, values in found[0].items():
        np.testing.assert_array_equal(values, found[1][name], name)
        assert values.shape == (60,)


def test_latents_are_centred():
    pictures = np.random.default_rng(0).standard_normal((6, 4, 3, 3)) + 10
    scores = baselines.latents(pictures, pictures)
    np.testing.assert_allclose(np.diag(scores), -1, atol=1e-6)
    assert scores[~np.eye(6, dtype=bool)].mean() > -0.1
