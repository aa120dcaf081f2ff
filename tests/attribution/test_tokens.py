"""A score is the sum over the tokens of either side, and what a token has is what its own gradient gives."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scripts.tiny import collate, make_examples, make_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import datainf
from datainf.attribution.tokens import TokenInfluence, token_influence
from datainf.data import images, text
from datainf.errors import InputError
from datainf.models import causal_lm, diffusion, losses
from datainf.models.lora import Recipe

VERSIONS = 6
"""Noisy ones that the loss of a picture is the mean of."""


def llama_of(folder):
    task = text.load("sentence_transformations", n_train=1, n_test=1)
    recipe = Recipe(targets=("q_proj", "v_proj"), epochs=1, batch_size=8, learning_rate=0.01)
    tuned = causal_lm.fine_tune("demo-llama", task, recipe, folder=folder)
    return tuned.model.double(), tuned.train, tuned.query, losses.completion, tuned.collate


def unet_of(folder):
    task = images.load("demo-style", n_train=3, n_test=1, size=32)
    recipe = Recipe(targets=("to_q", "to_k", "to_v", "to_out.0"), steps=5, batch_size=4)
    tuned = diffusion.fine_tune("demo-diffusion", task, recipe, folder=folder)
    return tuned.model, tuned.train, tuned.query, losses.denoising, tuned.collate


def classifier_of(folder):
    examples = make_examples(12)
    return make_model().double(), examples[:9], examples[9:], losses.classification, collate


@pytest.mark.parametrize("make", [classifier_of, llama_of, unet_of])
@pytest.mark.parametrize("method", ["datainf", "exact"])
def test_a_score_is_the_sum_over_the_tokens_of_either_side(make, method, tmp_path):
    model, train_set, query_set, loss_fn, collate_fn = make(tmp_path)
    options = {"collate_fn": collate_fn, "rows_per_example": 1 if make is not unet_of else VERSIONS}
    train, query = (
        datainf.per_sample_gradients(model, each, loss_fn, dtype=torch.float64, **options)
        for each in (train_set, query_set)
    )
    # The UNet computes in float32, of whose digits an inverse takes some: the more, the less it is damped.
    damping, near = (10, 1e-5) if make is unet_of else (0.1, 1e-9)
    scores = datainf.influence(train, query, method, damping)
    near *= scores.abs().max()
    some = [train_set[index] for index in (0, 2)]
    of_queries = datainf.ihvp(train, query, method, damping)
    found = token_influence(model, some, loss_fn, of_queries, **options)
    for index, each in zip((0, 2), found, strict=True):
        assert (each.total - scores[:, index]).abs().max() < near
    of_examples = datainf.ihvp(train, {name: rows[:2] for name, rows in train.items()}, method, damping)
    (back,) = token_influence(model, [query_set[1]], loss_fn, of_examples, **options)
    assert (back.total - scores[1, :2]).abs().max() < near


def test_the_tokens_of_a_language_model_are_its_own(tmp_path):
    model, train_set, query_set, loss_fn, collate_fn = llama_of(tmp_path)
    query = datainf.per_sample_gradients(model, query_set, loss_fn, collate_fn=collate_fn)
    (one,) = token_influence(model, [train_set[0]], loss_fn, query, collate_fn=collate_fn)
    (length,) = one.by_length
    assert length == len(train_set[0]["input_ids"]) and (one.rest == 0).all()
    # By definition, of one layer: the token's own gradient, times R.
    name = next(name for name in query if "lora_B" in name)
    module = model.get_submodule(name.removesuffix(".weight"))
    seen = {}
    hook = module.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    loss = loss_fn(model.eval(), collate_fn([train_set[0]])).sum()
    hook.remove()
    (dy,) = torch.autograd.grad(loss, [seen["y"]])
    R = query[name][0].view(dy.shape[-1], -1).double()
    expected = -torch.stack([dy[0, t].double() @ R @ seen["x"][0, t].double() for t in range(length)])
    (alone,) = token_influence(model, [train_set[0]], loss_fn, {name: query[name]}, collate_fn=collate_fn)
    torch.testing.assert_close(alone.by_length[length][0].double(), expected.detach(), rtol=1e-4, atol=1e-7)


def test_a_picture_has_places(tmp_path):
    model, train_set, query_set, loss_fn, collate_fn = unet_of(tmp_path)
    options = {"collate_fn": collate_fn, "rows_per_example": VERSIONS}
    query = datainf.per_sample_gradients(model, query_set, loss_fn, **options)
    (one,) = token_influence(model, [train_set[0]], loss_fn, query, **options)
    height, width = train_set[0]["sample"].shape[-2:]
    places = one.places(height, width)
    assert places.shape == (len(query_set), height, width)
    squares = {(height >> k) * (width >> k) for k in range(4)}
    of_places = sum(each.sum(dim=1) for length, each in one.by_length.items() if length in squares)
    torch.testing.assert_close(places.sum(dim=(1, 2)), of_places)


def test_places_are_spread_evenly():
    one = TokenInfluence({16: torch.arange(16.0)[None], 4: torch.tensor([[4.0, 8.0, 12.0, 16.0]])}, torch.zeros(1))
    places = one.places(4, 4)[0]
    assert places[0].tolist() == [0 + 1, 1 + 1, 2 + 2, 3 + 2] and places[3].tolist() == [12 + 3, 13 + 3, 14 + 4, 15 + 4]
    with pytest.raises(InputError, match="No layer sees 5 x 5 places; there are"):
        TokenInfluence({7: torch.zeros(1, 7)}, torch.zeros(1)).places(5, 5)


def test_layers_that_are_no_matrix_count_as_the_rest():
    model = make_model()
    table = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    table.weight.requires_grad_(True)
    examples = make_examples(6)
    store = datainf.per_sample_gradients(model, examples, losses.classification, collate_fn=collate)
    (one,) = token_influence(model, examples[:1], losses.classification, store, collate_fn=collate)
    scores = datainf.influence(store, store, lambda G, V, lam: V)
    assert (one.total - scores[:, 0]).abs().max() < 1e-5 * scores.abs().max()


def test_layers_that_see_tokens_without_their_order_count_as_the_rest():
    """OPT's feed-forward modules see all tokens of a batch in one list, as experts see those that fall to them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "num_attention_heads": 2}
    base = OPTForCausalLM(OPTConfig(vocab_size=40, num_hidden_layers=1, max_position_embeddings=32, **sizes)).double()
    lora = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    texts = [torch.randint(5, 40, (length,)).tolist() for length in (7, 4)]
    examples = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in texts]
    as_batch = lambda some: {key: torch.tensor([one[key] for one in some]) for key in some[0]}  # noqa: E731
    options = {"collate_fn": as_batch, "batch_size": 1, "dtype": torch.float64}
    with pytest.warns(UserWarning, match="are taken one example at a time"):
        store = datainf.per_sample_gradients(model, examples, losses.completion, **options)
    scores = datainf.influence(store, store, "hessian_free")
    found = token_influence(model, examples, losses.completion, store, collate_fn=as_batch)
    for index, (one, ids) in enumerate(zip(found, texts, strict=True)):
        torch.testing.assert_close(one.total, scores[:, index], rtol=1e-9, atol=0)
        assert one.rest.abs().min() > 0 and list(one.by_length) == [len(ids)]
    assert not any(weight.grad is not None for weight in model.parameters())
