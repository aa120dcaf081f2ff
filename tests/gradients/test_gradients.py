"""The hooks against the one-example loop, and everything that must not change a gradient."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import datainf
from datainf.errors import InputError
from datainf.gradients.layers import trainable_layers
from datainf.models.losses import classification

FAMILIES = ("roberta", "bert", "llama")


def relative_error(found, expected):
    assert found.keys() == expected.keys()
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_equal_the_loop(family, dtype, tolerance, batch_size, make_model, token_examples, pad_collate):
    """Mixed lengths, so padding too: the loop pads nothing."""
    model = make_model(family, dtype=dtype)
    arguments = (model, token_examples, classification)
    fast = datainf.per_sample_gradients(*arguments, collate_fn=pad_collate, batch_size=batch_size, dtype=dtype)
    slow = datainf.reference_gradients(*arguments, collate_fn=pad_collate)
    assert fast.n == 12
    assert relative_error(fast, slow) <= tolerance


def test_which_layers_there_are(make_model):
    names = list(trainable_layers(make_model("roberta", rank=3)))
    assert len(names) == 3 * 2 + 2  # lora_A and lora_B of three value matrices, two matrices of the head
    assert sum("lora_A" in name for name in names) == sum("lora_B" in name for name in names) == 3
    assert names[-1].endswith("classifier.modules_to_save.default.out_proj.weight")
    assert not any("bias" in name or "original_module" in name for name in names)


def test_each_layer_has_the_shape_of_its_matrix(make_model, token_examples, pad_collate, tmp_path):
    model = make_model("roberta")
    arguments = (model, token_examples[:4], classification)
    store = datainf.per_sample_gradients(*arguments, collate_fn=pad_collate, store=tmp_path)
    expected = {name: tuple(weight.shape) for name, weight in trainable_layers(model).items()}
    assert store.shapes == datainf.reference_gradients(*arguments, collate_fn=pad_collate).shapes == expected
    convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, bias=False), torch.nn.Flatten(), torch.nn.LayerNorm(16))
    pictures = [torch.randn(3, 3, 3) for _ in range(4)]
    own = lambda model, batch: model(batch).square().sum(dim=1)  # noqa: E731
    assert datainf.per_sample_gradients(convolution, pictures, own).shapes == {"0.weight": (4, 12), "2.weight": (16, 1)}


def test_grouped_query_attention_keeps_its_own_widths(make_model, token_examples, pad_collate):
    store = datainf.per_sample_gradients(make_model("llama"), token_examples, classification, collate_fn=pad_collate)
    width = {name.split("self_attn.")[-1]: G.shape[1] for name, G in store.items() if "layers.0" in name}
    assert width["q_proj.lora_B.default.weight"] == 2 * 32
    assert width["v_proj.lora_B.default.weight"] == 2 * 16


def test_extra_padding_changes_nothing(make_model, token_examples, pad_collate):
    def padded_further(examples):
        longest = max(examples, key=lambda example: len(example["input_ids"]))
        filler = {"input_ids": longest["input_ids"] + [7] * 9, "labels": 0}
        return {name: value[:-1] for name, value in pad_collate([*examples, filler]).items()}

    model = make_model("roberta")
    plain, further = (
        datainf.per_sample_gradients(model, token_examples, classification, collate_fn=collate)
        for collate in (pad_collate, padded_further)
    )
    assert relative_error(further, plain) <= 1e-5


def test_order_of_the_dataset_is_kept(make_model, token_examples, pad_collate):
    model = make_model("bert")
    order = [7, 3, 11, 0, 5, 1, 9, 2, 10, 4, 8, 6]
    plain = datainf.per_sample_gradients(model, token_examples, classification, collate_fn=pad_collate, batch_size=4)
    shuffled = datainf.per_sample_gradients(
        model, [token_examples[i] for i in order], classification, collate_fn=pad_collate, batch_size=5
    )
    assert relative_error(shuffled, {name: G[order] for name, G in plain.items()}) <= 1e-5


def test_the_mean_is_the_gradient_of_the_mean_loss(make_model, token_examples, pad_collate):
    model = make_model("roberta", dtype=torch.float64).eval()
    store = datainf.per_sample_gradients(
        model, token_examples, classification, collate_fn=pad_collate, dtype=torch.float64
    )
    classification(model, pad_collate(token_examples)).mean().backward()
    grads = {name: p.grad.flatten()[None] for name, p in model.named_parameters() if name in store}
    assert store.mean().n == 1
    assert relative_error(store.mean(), grads) <= 1e-10


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was_found(failing, make_model, token_examples, pad_collate):
    model = make_model("roberta")
    model.base_model.model.roberta.encoder.layer[1].eval()
    trained = next(p for p in model.parameters() if p.requires_grad)
    trained.grad = torch.ones_like(trained)

    def state():
        return (
            {name: (p.requires_grad, p.grad is None, p.detach().clone()) for name, p in model.named_parameters()},
            {name: (m.training, len(m._forward_hooks)) for name, m in model.named_modules()},
        )

    def loss_fn(model, batch):
        losses = classification(model, batch)
        return losses / 0 if failing else losses

    before = state()
    if failing:
        with pytest.raises(ValueError, match="not finite"):
            datainf.per_sample_gradients(model, token_examples, loss_fn, collate_fn=pad_collate)
    else:
        datainf.per_sample_gradients(model, token_examples, loss_fn, collate_fn=pad_collate)
        datainf.reference_gradients(model, token_examples[:2], loss_fn, collate_fn=pad_collate)
    parameters, modules = state()
    assert modules == before[1]
    for name, (requires_grad, no_grad, value) in parameters.items():
        assert (requires_grad, no_grad) == before[0][name][:2]
        assert torch.equal(value, before[0][name][2])


def test_backward_stops_at_the_lowest_layer_asked_for(make_model, token_examples, pad_collate):
    """With only the last encoder layer's adapter asked for, nothing below it is differentiated."""
    model = make_model("roberta")
    below = model.base_model.model.roberta.encoder.layer[1].output
    seen = []
    below.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    datainf.per_sample_gradients(
        model, token_examples, classification, collate_fn=pad_collate, layers=r"encoder\.layer\.2\."
    )
    assert seen[0] is False  # of the batch; the comparison with plain training comes after
    seen.clear()
    datainf.per_sample_gradients(model, token_examples, classification, collate_fn=pad_collate)
    assert seen[0] is True


def test_layers_choose(make_model, token_examples, pad_collate):
    model = make_model("roberta")
    arguments = (model, token_examples, classification)
    every = datainf.per_sample_gradients(*arguments, collate_fn=pad_collate)
    adapters = datainf.per_sample_gradients(*arguments, collate_fn=pad_collate, layers="lora_")
    name = list(every)[2]
    one = datainf.per_sample_gradients(*arguments, collate_fn=pad_collate, layers=[name])
    assert len(adapters) == 6 and list(one) == [name]
    assert relative_error(adapters, {n: every[n] for n in adapters}) <= 1e-6
    assert relative_error(one, {name: every[name]}) <= 1e-6


def test_a_module_used_twice_contributes_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(torch.tanh(self.linear(x)))

    model, data = Twice(), list(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
    loss_fn = lambda model, batch: model(batch).square().sum(dim=1)  # noqa: E731
    fast = datainf.per_sample_gradients(model, data, loss_fn, batch_size=5)
    assert relative_error(fast, datainf.reference_gradients(model, data, loss_fn)) <= 1e-5


def test_out_of_memory_halves_the_batch(make_model, token_examples, pad_collate):
    sizes = []

    def loss_fn(model, batch):
        sizes.append(len(batch["labels"]))
        if len(batch["labels"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return classification(model, batch)

    model = make_model("roberta")
    halved = datainf.per_sample_gradients(model, token_examples, loss_fn, collate_fn=pad_collate, batch_size=12)
    # Two examples of the first batch that fits are compared with plain training.
    assert sizes == [12, 6, 3, 1, 1, 3, 6, 3, 3]
    whole = datainf.per_sample_gradients(model, token_examples, classification, collate_fn=pad_collate)
    assert relative_error(halved, whole) <= 1e-5


def test_a_budget_of_tokens_makes_the_batches(make_model, token_examples, pad_collate):
    seen = []

    def loss_fn(model, batch):
        seen.append(tuple(batch["input_ids"].shape))
        return classification(model, batch)

    model = make_model("roberta")
    found = datainf.per_sample_gradients(model, token_examples, loss_fn, collate_fn=pad_collate, batch_tokens=36)
    # By lengths 24, 17, 13, 11, 9, 9, 8, 6, 5, 4, 3, 2; a batch is the longest's multiple, of at most 36 tokens.
    assert seen[0] == (1, 24)  # the first batch of several ends with a shorter one, 6
    assert [shape for shape in seen if shape[0] > 1] == [(2, 17), (2, 13), (4, 9), (3, 4)]
    assert [shape for shape in seen[1:] if shape[0] == 1] == [(1, 24), (1, 17), (1, 6)]  # compared with plain training
    expected = datainf.per_sample_gradients(model, token_examples, classification, collate_fn=pad_collate)
    assert relative_error(found, expected) <= 1e-5
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, not 0"):
        datainf.per_sample_gradients(model, token_examples, classification, batch_tokens=0)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_gradients_that_have_no_room_are_refused_before_work(where, tmp_path, make_model, token_examples, monkeypatch):
    def loss_fn(model, batch):
        raise AssertionError("work was begun")

    free = SimpleNamespace(available=1000, free=1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    store = tmp_path / "store" if where == "disk" else None
    with pytest.raises(InputError, match=rf"12 examples take 70.7kB, but (the )?{where} has 1.00kB free"):
        datainf.per_sample_gradients(make_model("roberta"), token_examples, loss_fn, store=store)


def test_other_errors_are_not_taken_for_out_of_memory(make_model, token_examples, pad_collate):
    def loss_fn(model, batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        datainf.per_sample_gradients(make_model("roberta"), token_examples, loss_fn, collate_fn=pad_collate)


def test_half_precision_storage(make_model, token_examples, pad_collate):
    arguments = (make_model("roberta"), token_examples, classification)
    full = datainf.per_sample_gradients(*arguments, collate_fn=pad_collate)
    half = datainf.per_sample_gradients(*arguments, collate_fn=pad_collate, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.nbytes * 2 == full.nbytes
    assert relative_error({n: G.float() for n, G in half.items()}, full) <= 2**-8


class MixesExamples(nn.Module):
    """It takes the mean of the batch away."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x - x.mean(dim=0)).sin().sum(dim=1)


def raises(message, model, data, loss_fn, **arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        datainf.per_sample_gradients(model, data, loss_fn, **arguments)


def test_bad_input_is_named_in_one_sentence(make_model, token_examples, pad_collate):
    model = make_model("roberta")
    collate = {"collate_fn": pad_collate}
    raises("The dataset has no examples", model, [], classification, **collate)
    raises("matches none of the 8 layers", model, token_examples, classification, layers="q_proj", **collate)
    raises(
        "No trainable weight is called 'x'",
        model,
        token_examples,
        classification,
        layers=["x"],
        **collate,
    )
    raises("batch_size must be at least 1", model, token_examples, classification, batch_size=0, **collate)
    raises(
        "one loss per example, shape (12,), not ()",
        model,
        token_examples,
        lambda model, batch: classification(model, batch).mean(),
        **collate,
    )
    raises(
        "does not depend on any of the layers",
        model,
        token_examples,
        lambda model, batch: classification(model, batch).detach(),
        **collate,
    )
    bad = lambda model, batch: classification(model, batch) / (batch["input_ids"].shape[1] - 17)  # noqa: E731
    raises("The loss of example 1 is not finite", model, token_examples, bad, batch_size=1, **collate)
    raises("so it is not its own", MixesExamples(), list(torch.randn(3, 4)), lambda model, batch: model(batch))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    raises("no trainable weight", model, token_examples, classification, **collate)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_equals_cpu(family, make_model, token_examples, pad_collate):
    model = make_model(family, dtype=torch.float64)
    arguments = {"collate_fn": pad_collate, "dtype": torch.float64}
    on_cpu = datainf.per_sample_gradients(model, token_examples, classification, **arguments)
    on_gpu = datainf.per_sample_gradients(model.cuda(), token_examples, classification, **arguments)
    one_by_one = datainf.reference_gradients(model, token_examples, classification, collate_fn=pad_collate)
    # A Llama of any type computes its norms and rotations in float32, whose rounding is another on each device.
    assert relative_error(on_gpu, on_cpu) <= (1e-6 if family == "llama" else 1e-10)
    assert relative_error(on_gpu, one_by_one) <= (1e-6 if family == "llama" else 1e-10)


# Convolutions, and examples of several rows.


def squares(model, batch):
    """One number for each example, of all its rows."""
    return model(batch["x"].flatten(0, 1)).square().flatten(1).sum(dim=1).view(len(batch["x"]), -1).sum(dim=1)


def images_of(rows):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(rows, 3, 9, 9, generator=generator, dtype=torch.float64)} for _ in range(5)]


@pytest.mark.parametrize("shape", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 0)}])
@pytest.mark.parametrize("rows", [1, 3])
def test_convolutions_equal_the_loop(shape, rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 2), **shape), nn.Tanh(), nn.Conv2d(4, 2, 1)).double()
    arguments = (model, images_of(rows), squares)
    fast = datainf.per_sample_gradients(*arguments, rows_per_example=rows, batch_size=2, dtype=torch.float64)
    assert relative_error(fast, datainf.reference_gradients(*arguments)) <= 1e-12


def test_rows_side_by_side_are_the_gradients_of_the_rows():
    torch.manual_seed(0)
    model, examples = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(196, 2)).double(),
        images_of(3),
    )
    wide = datainf.per_sample_gradients(
        model, examples, squares, rows_per_example=3, concatenate=True, batch_size=2, dtype=torch.float64
    )
    apart = [{"x": row[None]} for example in examples for row in example["x"]]
    plain = datainf.reference_gradients(model, apart, squares)
    assert relative_error(wide, {name: rows.view(5, -1) for name, rows in plain.items()}) <= 1e-12


def test_rows_that_are_not_the_models_are_taken_one_example_at_a_time():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    with pytest.warns(UserWarning, match="one example at a time, since its module sees 6 rows for a batch of 2 exampl"):
        found = datainf.per_sample_gradients(model, images_of(3)[:2], squares)
    assert relative_error(found, datainf.reference_gradients(model, images_of(3)[:2], squares)) <= 1e-6


def test_a_store_of_rows_side_by_side_is_told_from_one_of_their_sum(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    arguments = {"rows_per_example": 2, "store": tmp_path / "store"}
    datainf.per_sample_gradients(model, images_of(2), squares, **arguments)
    with pytest.raises(ValueError):
        datainf.per_sample_gradients(model, images_of(2), squares, concatenate=True, **arguments)
