"""The rows of the true Fisher information, against its definition."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import datainf
from datainf.errors import InputError
from datainf.models import fisher, losses

VOCABULARY = 40


def whole(store) -> torch.Tensor:
    return torch.cat([store[name].double() for name in store], dim=1)


def test_rows_of_every_label_make_the_true_fisher_information(make_model, token_examples, pad_collate):
    model = make_model("roberta", dtype=torch.float64)
    take = {"collate_fn": pad_collate, "dtype": torch.float64}
    rows = datainf.per_sample_gradients(model, fisher.with_every_label(token_examples), fisher.of_every_label, **take)
    found = whole(rows)
    H = found.T @ found / len(found)
    expected = 0
    model.eval()
    for example in token_examples:
        for label in (0, 1):
            one = {**example, "labels": label}
            g = whole(datainf.reference_gradients(model, [one], losses.classification, collate_fn=pad_collate))[0]
            with torch.no_grad():
                p = torch.exp(-losses.classification(model, pad_collate([one])))[0]
            expected = expected + p * torch.outer(g, g) / len(token_examples)
    torch.testing.assert_close(H, expected, rtol=1e-9, atol=1e-14)


def test_of_two_labels_the_given_one_is_enough(make_model, token_examples, pad_collate):
    """The other label's gradient is the given one's times -p / (1 - p), so that one row for each example will do."""
    model = make_model("roberta", dtype=torch.float64)
    take = {"collate_fn": pad_collate, "dtype": torch.float64}
    train = datainf.per_sample_gradients(model, token_examples, losses.classification, **take)
    rows = datainf.per_sample_gradients(model, fisher.with_every_label(token_examples), fisher.of_every_label, **take)
    model.eval()
    with torch.no_grad():
        p = torch.cat([torch.exp(-losses.classification(model, pad_collate([each]))) for each in token_examples])
    scale = ((p * (1 - p)).sqrt() / (1 - p))[:, None]
    given = {name: scale * train[name] for name in train}
    for method in ("exact", "joint"):
        found = datainf.influence(train, train, method, curvature=rows)
        expected = datainf.influence(train, train, method, curvature=given)
        assert (found - expected).norm() < 1e-8 * expected.norm()
        assert not torch.allclose(found, datainf.influence(train, train, method), rtol=1e-2)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, **shape))
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


def dialogue(lengths, side="right"):
    """Examples whose first three tokens are the prompt, in a padded batch."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(3)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        labels = torch.cat([torch.full((3,), losses.IGNORED), ids[3:]])
        for name, row, filler in (
            ("input_ids", ids, 0),
            ("attention_mask", torch.ones(length, dtype=int), 0),
            ("labels", labels, -100),
        ):
            padding = torch.full((longest - length,), filler)
            batch[name].append(torch.cat([row, padding] if side == "right" else [padding, row]))
    return {name: torch.stack(rows) for name, rows in batch.items()}


def test_a_response_is_drawn_from_the_model(decoder):
    """Over many seeds the mean loss is the model's entropy, and the mean gradient nothing."""
    batch = dialogue([9, 9, 9])
    with torch.no_grad():
        logits = decoder(input_ids=batch["input_ids"]).logits[:, 2:-1].log_softmax(dim=-1)
        entropy = -(logits.exp() * logits).sum(dim=-1).mean(dim=1)
        drawn = torch.stack([fisher.sampled_completion(decoder, batch, seed=1000 * seed) for seed in range(400)])
    error = drawn.std(dim=0) / 400**0.5
    assert ((drawn.mean(dim=0) - entropy).abs() < 4 * error).all()
    weight = next(parameter for name, parameter in decoder.named_parameters() if "lora_B" in name).requires_grad_()
    gradients = []
    for seed in range(400):
        loss = fisher.sampled_completion(decoder, batch, seed=1000 * seed).sum()
        gradients.append(torch.autograd.grad(loss, weight)[0].flatten())
    gradients = torch.stack(gradients)
    standardized = gradients.mean(dim=0) / (gradients.std(dim=0) / 400**0.5)
    assert standardized.square().mean() < 1.5  # 1 where the mean is nothing


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_example_is_given_the_same_response_in_every_batch(decoder, side):
    lengths = [9, 5, 12]
    with torch.no_grad():
        together = fisher.sampled_completion(decoder, dialogue(lengths, side))
        batch = dialogue(lengths, "right")
        for place, length in enumerate(lengths):
            alone = {name: rows[place : place + 1, :length] for name, rows in batch.items()}
            torch.testing.assert_close(fisher.sampled_completion(decoder, alone)[0], together[place])
        assert not torch.allclose(fisher.sampled_completion(decoder, batch, seed=1), together)


def test_the_rows_are_gradients_that_influence_takes(decoder):
    batch = dialogue([9, 5, 12, 7])
    examples = [{name: rows[place] for name, rows in batch.items()} for place in range(4)]
    train = datainf.per_sample_gradients(decoder, examples, losses.completion)
    rows = datainf.per_sample_gradients(decoder, examples, fisher.sampled_completion)
    assert datainf.influence(train, train, "kronecker", curvature=rows).isfinite().all()


def test_what_is_missing_is_named(decoder):
    batch = dialogue([9])
    with pytest.raises(InputError, match="The batch has no 'labels'"):
        fisher.sampled_completion(decoder, {name: batch[name] for name in ("input_ids", "attention_mask")})
