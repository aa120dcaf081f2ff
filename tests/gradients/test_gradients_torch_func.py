"""Layers that are no plain matrices, whose modules are run again through torch.func, against the one-example loop."""

import warnings

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import datainf
from datainf.gradients.layers import is_matrix, owners, trainable_layers
from datainf.models.losses import classification

PRECISION = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def check(model, data, loss_fn, *, dtype=torch.float64, tolerance=1e-10, batch_size=5, **arguments):
    """Both ways to the gradients agree in every layer, and no layer's are zero. Returns them."""
    fast = datainf.per_sample_gradients(model, data, loss_fn, dtype=dtype, batch_size=batch_size, **arguments)
    slow = datainf.reference_gradients(model, data, loss_fn, **arguments)
    assert list(fast) == list(slow)
    for name, expected in slow.items():
        assert 0 < expected.norm() and (fast[name] - expected).norm() <= tolerance * expected.norm(), name
    return fast


def shaken(model):
    """Adapters begin at zeros, ones or the base's own norms: move them all."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def adapted(model, config_class, dtype=torch.float64, **config):
    config = config_class(task_type="SEQ_CLS", **config)
    return shaken(get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype))


def gpt2(model_class):
    torch.manual_seed(0)
    size = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return model_class(GPT2Config(**size, pad_token_id=1, bos_token_id=0, eos_token_id=0, num_labels=2))


@pytest.fixture
def base(make_model):
    """``base(family)``: the family's small model, without an adapter."""
    return lambda family: make_model(family).unload()


# Adapters. The examples are of mixed lengths, so that the batches are padded; the loop pads nothing.


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_dora(family, dtype, tolerance, make_model, token_examples, pad_collate):
    model = shaken(make_model(family, dtype=dtype, use_dora=True))
    store = check(model, token_examples, classification, collate_fn=pad_collate, dtype=dtype, tolerance=tolerance)
    assert sum("lora_magnitude_vector" in name for name in store) == 3 * (2 if family == "llama" else 1)
    assert any("lora_A" in name for name in store) and any("score" in name or "classifier" in name for name in store)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize(("family", "down"), [("roberta", "output.dense"), ("llama", "down_proj")])
def test_ia3(family, down, dtype, tolerance, base, token_examples, pad_collate):
    targets = {"target_modules": [{"roberta": "value", "llama": "v_proj"}[family], down], "feedforward_modules": [down]}
    model = adapted(base(family), IA3Config, dtype, **targets)
    store = check(model, token_examples, classification, collate_fn=pad_collate, dtype=dtype, tolerance=tolerance)
    assert any(name.endswith("ia3_l.default") for name in store)


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_on_embeddings(use_dora, base, token_examples, pad_collate):
    """BERT looks its positions up once for all rows of a batch."""
    targets = ["word_embeddings", "position_embeddings", "value"]
    model = adapted(base("bert"), LoraConfig, r=2, target_modules=targets, use_dora=use_dora)
    store = check(model, token_examples, classification, collate_fn=pad_collate)
    assert sum("lora_embedding_A" in name for name in store) == 2


def test_a_saved_embedding(base, token_examples, pad_collate):
    saved = {"target_modules": ["value"], "modules_to_save": ["word_embeddings", "classifier"]}
    store = check(
        adapted(base("roberta"), LoraConfig, r=2, **saved), token_examples, classification, collate_fn=pad_collate
    )
    assert any(name.endswith("word_embeddings.modules_to_save.default.weight") for name in store)


def test_lora_on_conv1d_is_matrices_alone(token_examples, pad_collate):
    config = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = adapted(gpt2(GPT2ForSequenceClassification), LoraConfig, **config)
    check(model, token_examples, classification, collate_fn=pad_collate)
    assert all(is_matrix(*item) for item in owners(model, trainable_layers(model)).items())


def test_an_adapter_that_torch_func_does_not_take(base, token_examples, pad_collate):
    """LoHa differentiates itself, by an autograd.Function of the old style: its rows are taken one by one."""
    model = adapted(base("bert"), LoHaConfig, r=2, target_modules=["value"])
    check(model, token_examples, classification, collate_fn=pad_collate)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu(make_model, token_examples, pad_collate):
    model = shaken(make_model("roberta", dtype=torch.float64, use_dora=True))
    arguments = {"collate_fn": pad_collate, "dtype": torch.float64}
    on_cpu = datainf.per_sample_gradients(model, token_examples, classification, **arguments)
    on_gpu = datainf.per_sample_gradients(model.cuda(), token_examples, classification, **arguments)
    for name, expected in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], expected, rtol=1e-9, atol=1e-12)


# Whole models.


def next_tokens(model, batch):
    """The negative log-likelihood of every example's tokens but the first."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none")
    return (losses * batch["attention_mask"][:, 1:]).sum(dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_gpt2_with_every_weight_trainable(dtype, tolerance, token_examples, pad_collate):
    """Conv1D, normalizations, positions, and an embedding that is the head too: one layer, under its first name."""
    model = gpt2(GPT2LMHeadModel).to(dtype)
    store = check(model, token_examples, next_tokens, collate_fn=pad_collate, dtype=dtype, tolerance=tolerance)
    assert not any("bias" in name or "lm_head" in name for name in store)
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} <= set(store)
    assert store["transformer.h.0.attn.c_attn.weight"].shape == (12, 16 * 48)


def test_only_the_normalizations(base, token_examples, pad_collate):
    model = base("bert").double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("LayerNorm" in name)
    store = check(model, token_examples, classification, collate_fn=pad_collate)
    assert len(store) == 1 + 2 * 3 and all(name.endswith("LayerNorm.weight") for name in store)


class Scales(nn.Module):
    """A parameter in a container, and an output that is no tensor."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterDict({"one": nn.Parameter(torch.rand(8))})

    def forward(self, x, *, times):
        return {"x": x * self.scales["one"] * times, "rows": len(x)}


class Attends(nn.Module):
    """torch's attention, whose forward uses its parts' weights without calling the parts."""

    def __init__(self):
        super().__init__()
        self.scaled, self.attention = Scales(), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.scaled(x, times=torch.tensor(2.0))["x"]
        return self.attention(x, x, x)[0].pow(3).sum(dim=(1, 2))


def test_parameters_act_through_the_module_that_uses_them():
    torch.manual_seed(0)
    store = check(Attends().double(), list(torch.randn(7, 5, 8, dtype=torch.float64)), lambda model, x: model(x))
    assert set(store) == {"scaled.scales.one", "attention.in_proj_weight", "attention.out_proj.weight"}


# Convolutions, and examples of several rows.


def squares(model, batch):
    """One number for each example, of all its rows."""
    return model(batch["x"].flatten(0, 1)).square().flatten(1).sum(dim=1).view(len(batch["x"]), -1).sum(dim=1)


def examples_of(rows, *shape):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(rows, 3, *shape, generator=generator, dtype=torch.float64)} for _ in range(5)]


CONVOLUTIONS = {
    "grouped": (nn.Conv2d(3, 6, 3, groups=3), (7, 7)),
    "same": (nn.Conv2d(3, 4, 3, padding="same"), (7, 7)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (7, 7)),
    "1d": (nn.Conv1d(3, 4, 3, stride=2), (9,)),
    "3d": (nn.Conv3d(3, 2, 2), (4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2), (5, 5)),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_equal_the_loop(kind, rows):
    module, shape = CONVOLUTIONS[kind]
    model = nn.Sequential(module, nn.Tanh(), nn.GroupNorm(1, module.out_channels)).double()
    arguments = {"rows_per_example": rows, "batch_size": 2, "dtype": torch.float64}
    fast = datainf.per_sample_gradients(model, examples_of(rows, *shape), lambda *a: squares(*a).tanh(), **arguments)
    slow = datainf.reference_gradients(model, examples_of(rows, *shape), lambda *a: squares(*a).tanh())
    for name, expected in slow.items():
        torch.testing.assert_close(fast[name], expected, rtol=1e-10, atol=1e-10)


def test_rows_side_by_side_are_the_gradients_of_the_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Tanh(), nn.LayerNorm(5), nn.Conv2d(3, 2, 2)).double()
    examples = examples_of(3, 7, 7)
    wide = datainf.per_sample_gradients(
        model, examples, squares, rows_per_example=3, concatenate=True, batch_size=2, dtype=torch.float64
    )
    apart = [{"x": row[None]} for example in examples for row in example["x"]]
    for name, rows in datainf.reference_gradients(model, apart, squares).items():
        torch.testing.assert_close(wide[name], rows.view(5, -1), rtol=1e-10, atol=1e-10)


# What cannot be told apart in a batch is taken one example at a time.


class Embeds(nn.Module):
    """Takes its embedding's rows itself, or positions without a batch; has a matrix that it does not use."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embedding, self.positions = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.head, self.spare = nn.Linear(4, 1), nn.Linear(2, 2)

    def forward(self, tokens):
        embedded = self.embedding.weight[tokens] if self.how == "itself" else self.embedding(tokens)
        if self.how == "twice":
            embedded = embedded + self.embedding.weight[tokens]
        if self.how == "positions":
            embedded = embedded + self.positions(torch.arange(tokens.shape[1]))
        return self.head(embedded.tanh().mean(dim=1)).squeeze(1)


TOKENS = list(torch.arange(36).view(6, 6) % 9)


@pytest.mark.parametrize(
    ("how", "layer"), [("itself", "embedding"), ("twice", "embedding"), ("positions", "positions")]
)
def test_a_weight_that_acts_otherwise_is_taken_one_example_at_a_time(how, layer):
    """Six tokens in each of six examples: the positions could be taken for one example each."""
    model, loss_fn = Embeds(how), lambda model, batch: model(batch)
    with pytest.warns(UserWarning, match=f"1 of 4 layers, such as '{layer}.weight', are taken one example at a time"):
        found = datainf.per_sample_gradients(model, TOKENS, loss_fn)
    for name, expected in datainf.reference_gradients(model, TOKENS, loss_fn).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_weight_that_is_not_used_has_zeros_and_what_is_recorded_costs_nothing():
    calls = []

    def loss_fn(model, batch):
        calls.append(len(batch))
        return model(batch)

    model = Embeds("by its module")
    store = datainf.per_sample_gradients(model, TOKENS, loss_fn, batch_size=2)
    assert not store["spare.weight"].any() and not store["positions.weight"].any()
    # Two of the first batch are compared with plain training, and two of the second, whether there is nothing still.
    assert calls == [2, 1, 1, 2, 1, 1, 2]


def test_a_loss_that_draws_noise_is_not_taken_for_a_weight_that_acts_otherwise():
    def loss_fn(model, batch):
        return model(batch) * torch.rand(len(batch))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = datainf.per_sample_gradients(Embeds("by its module"), TOKENS, loss_fn)
    assert store["embedding.weight"].norm() > 0
    with pytest.warns(UserWarning, match="such as 'embedding.weight', are taken one example at a time"):
        datainf.per_sample_gradients(Embeds("twice"), TOKENS, loss_fn)
