"""Whatever model, loss or batch comes: the gradients are those of plain training, one example at a time, or refused.

The truth is `torch.autograd.grad` here, of one example alone, and nothing of the package.
"""

import re
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

import datainf
from datainf.models.losses import classification

SIX = list(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
SEQUENCES = list(torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def truth(model, dataset, loss_fn, names, collate_fn=default_collate):
    """Layer -> (n, d_l) in evaluation, by autograd, one example at a time."""
    model.eval()
    parameters = dict(model.named_parameters())
    rows = []
    for index in range(len(dataset)):
        loss = loss_fn(model, collate_fn([dataset[index]])).sum()
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names], materialize_grads=True)
        rows.append([gradient.flatten() for gradient in gradients])
    return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(names)}


def assert_true(model, dataset, loss_fn, tolerance=1e-8, slow=None, collate_fn=default_collate, **arguments):
    """`slow`: how many layers are taken one example at a time; any number if None."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options = {"collate_fn": collate_fn, "dtype": torch.float64} | arguments
        found = datainf.per_sample_gradients(model, dataset, loss_fn, **options)
    expected = truth(model, dataset, loss_fn, list(found), collate_fn)
    for name, rows in expected.items():
        assert (found[name] - rows).norm() <= tolerance * rows.norm() + 1e-14, name
    if slow is not None:
        numbers = [re.match(r"(\d+) of \d+ layers", str(warning.message)) for warning in said]
        assert sum(int(number[1]) for number in numbers if number) == slow
    return found


def own(model, x):
    """The loss of models that return one number for each row."""
    return model(x).flatten().square()


class Net(nn.Module):
    """A model of a few lines: its parts by name, and a forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        torch.manual_seed(0)
        for name, part in parts.items():
            setattr(self, name, part() if isinstance(part, type | partial) else part)
        self._forward = forward
        self.double()

    def forward(self, *args):
        return self._forward(self, *args)


# Matrices that are none.


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * (self.weight > 0), self.bias)


class Standardized(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


class Reversed(nn.Linear):
    """Its rows come out in another order: one example's input meets another's gradient."""

    def forward(self, x):
        return super().forward(x).flip(0)


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize("kind", [Masked, Twice])
def test_a_subclass_of_linear_is_run_again(kind):
    model = Net(lambda self, x: self.out(self.lin(x).tanh()), lin=kind(4, 4), out=nn.Linear(4, 1))
    assert_true(model, SIX, own, slow=0)


def test_a_subclass_of_a_convolution_is_run_again():
    images = list(torch.randn(6, 3, 6, 6, dtype=torch.float64))
    model = Net(lambda self, x: self.conv(x).tanh().flatten(1).sum(1), conv=Standardized(3, 4, 3))
    assert_true(model, images, own, slow=0)


@pytest.mark.parametrize(
    "norm",
    [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
    ids=["old weight_norm", "weight_norm", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_parametrized_weights(norm):
    model = Net(lambda self, x: self.out(self.lin(x).tanh()), lin=norm(nn.Linear(4, 4)), out=nn.Linear(4, 1))
    assert_true(model, SIX, own, slow=0)


@pytest.mark.parametrize("length", [2, 5, 6])
def test_time_before_the_batch(length):
    """Also where there are as many steps as examples, in the batch or among the two that are compared."""
    data = list(torch.randn(6, length, 4, dtype=torch.float64))
    model = Net(
        lambda self, x: self.out(self.lin(x.transpose(0, 1)).tanh().mean(0)), lin=nn.Linear(4, 4), out=nn.Linear(4, 1)
    )
    assert_true(model, data, own, slow=1)
    encoder = partial(nn.TransformerEncoderLayer, 4, 2, 8, dtype=torch.float64)
    model = Net(lambda self, x: self.out(self.encoder(x.transpose(0, 1)).mean(0)), encoder=encoder, out=nn.Linear(4, 1))
    assert_true(model, data, own)


def test_a_weight_that_something_else_uses_too():
    def forward(self, x):
        return (self.lin(x).tanh() @ self.lin.weight).sum(1)

    assert_true(Net(forward, lin=nn.Linear(4, 4)), SIX, own, slow=1)

    def penalized(model, x):
        return own(model, x) + model.lin.weight.square().sum()

    assert_true(Net(lambda self, x: self.lin(x).tanh().sum(1), lin=nn.Linear(4, 4)), SIX, penalized, slow=1)


def test_an_order_of_rows_that_changes_within():
    model = Net(lambda self, x: self.lin(x).flip(0).tanh().sum(1), lin=Reversed(4, 4))
    assert_true(model, SIX, own)


# Losses that are not an example's own.


def contrastive(model, x):
    z = F.normalize(model(x), dim=-1)
    return F.cross_entropy(z @ z.T, torch.arange(len(x)), reduction="none")


MIXING = {
    "statistics": lambda self, x: self.lin(x - x.mean(0)).tanh().sum(1),
    "statistics after": lambda self, x: F.normalize(self.lin(x), dim=0).sum(1),
    "the next example": lambda self, x: self.lin(x + x.roll(1, 0)).tanh().sum(1),
    "attention over examples": lambda self, x: (torch.softmax(x @ x.T, 1) @ self.lin(x).tanh()).sum(1),
}


@pytest.mark.parametrize("how", MIXING)
@pytest.mark.parametrize("batch_size", [2, 32])
def test_what_mixes_examples_is_refused_and_taken_alone_where_asked(how, batch_size):
    model = Net(MIXING[how], lin=nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"^The loss of example 0 is \S+ in a batch of [26] and \S+ alone, so it is not"
    ) as e:
        datainf.per_sample_gradients(model, SIX, own, batch_size=batch_size)
    assert "\n" not in str(e.value) and "batch_size=1" in str(e.value)
    assert_true(model, SIX, own, batch_size=1)


def test_a_contrastive_loss_is_refused():
    model = Net(lambda self, x: self.lin(x), lin=nn.Linear(4, 4))
    with pytest.raises(ValueError, match="so it is not its own"):
        datainf.per_sample_gradients(model, SIX, contrastive)


def by_length(rows):
    """Padded with zeros that nobody masks."""
    return nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True).double()


def test_padding_that_is_not_masked_is_refused_though_the_longest_is_alone_in_its_batch():
    """The first batch is of one example, and most batches are of like lengths."""
    data = [{"input_ids": torch.arange(1, length + 1)} for length in (24, 3, 3, 3, 4, 4)]
    model = Net(lambda self, x: self.lin(x[..., None]).tanh().mean(1).sum(1), lin=nn.Linear(1, 3))
    for batching in ({"batch_tokens": 24}, {"batch_size": 3}):
        with pytest.raises(ValueError, match="depends on the other examples or on padding"):
            datainf.per_sample_gradients(model, data, own, collate_fn=by_length, **batching)
    assert_true(model, data, own, collate_fn=by_length, batch_size=1)


# What cannot be told apart in a batch.


def windows(self, x):
    """Windows of all examples in one long batch, as in Swin."""
    return self.lin(x.reshape(-1, 1, 4)).tanh().view(len(x), -1).sum(1)


def recurrent(self, x):
    return self.out(self.rnn(x)[1][-1])


class Bank(nn.Module):
    """A vector bank that every layer takes its weights from, as VB-LoRA's."""

    def __init__(self):
        super().__init__()
        self.bank = nn.Parameter(torch.randn(3, 16))

    def forward(self, place):
        return self.bank[place].view(4, 4)


TOLD_APART_ALONE = {
    "windows": (windows, {"lin": partial(nn.Linear, 4, 4)}),
    "flattened tokens": (
        lambda self, x: self.lin(x.flatten(0, 1)).tanh().view(len(x), -1).sum(1),
        {"lin": partial(nn.Linear, 4, 4)},
    ),
    "GRU": (recurrent, {"rnn": partial(nn.GRU, 4, 3, batch_first=True), "out": partial(nn.Linear, 3, 1)}),
    "GRU cell": (
        lambda self, x: self.cell(x[:, 1], self.cell(x[:, 0])).sum(1),
        {"cell": partial(nn.GRUCell, 4, 3)},
    ),
    "a bank": (lambda self, x: (x.mean(1) @ self.bank(0) @ self.bank(2)).tanh().sum(1), {"bank": Bank}),
    "a parameter of the model": (
        lambda self, x: (x.mean(1) * self.scale).tanh().sum(1),
        {"scale": nn.Parameter(torch.ones(4))},
    ),
    "attention": (
        lambda self, x: self.attention(x, x, x)[0].mean(1).sum(1),
        {"attention": partial(nn.MultiheadAttention, 4, 2, batch_first=True)},
    ),
    "einsum": (
        lambda self, x: torch.einsum("bti,oi->bo", x, self.lin.weight).tanh().sum(1),
        {"lin": partial(nn.Linear, 4, 4)},
    ),
    "a bilinear form": (
        lambda self, x: self.form(x[:, 0], x[:, 1]).tanh().sum(1),
        {"form": partial(nn.Bilinear, 4, 4, 3)},
    ),
}


@pytest.mark.parametrize("how", TOLD_APART_ALONE)
def test_correct_and_slow_beats_refused(how):
    forward, parts = TOLD_APART_ALONE[how]
    assert_true(Net(forward, **parts), SEQUENCES, own)


def test_what_is_slow_is_said_once_and_rows_side_by_side_are_refused():
    model = Net(windows, lin=nn.Linear(4, 4))
    with pytest.warns(
        UserWarning, match="1 of 1 layers, such as 'lin.weight', are taken one example at a time, since "
    ):
        datainf.per_sample_gradients(model, SEQUENCES, own, batch_size=2)
    two = [torch.stack([row, 2 * row]) for row in SEQUENCES]

    def rows_of_two(model, x):
        return own(model, x.flatten(0, 1)).view(len(x), 2).sum(1)

    assert_true(model, two, rows_of_two, rows_per_example=2, slow=1)
    with pytest.raises(ValueError, match="the rows of an example cannot be told apart, since its module sees 60 rows"):
        datainf.per_sample_gradients(model, two, rows_of_two, rows_per_example=2, concatenate=True)


def test_a_module_that_sees_some_of_the_examples():
    """An expert of a mixture: by chance it may see as many rows as there are examples, or none for a while."""

    def forward(self, x):
        flat = x.reshape(-1, 4)
        chosen = flat[:, 0] > 0
        out = torch.zeros(len(flat), 4, dtype=flat.dtype)
        out[chosen], out[~chosen] = self.one(flat[chosen]), self.other(flat[~chosen])
        return out.view(len(x), -1).tanh().sum(1)

    for length in (1, 2, 5):
        data = list(torch.randn(12, length, 4, dtype=torch.float64))
        data[0][..., 0], data[-1][..., 0] = 1, 1  # those that are compared see one expert alone
        assert_true(Net(forward, one=nn.Linear(4, 4), other=nn.Linear(4, 4)), data, own, batch_size=3)


def test_a_layer_that_comes_late_and_one_that_stays_away():
    """Neither is to be seen in the examples that are compared first, the ends and the middle."""

    def forward(self, x):
        out, late, early = self.always(x).tanh(), x[:, :1] < 0, x[:, :1] >= 0
        if late.any():
            out = out + late * (self.late(x) @ self.late.weight)
        return (out + early * self.early(x) if early.any() else out).sum(1)

    data = [-row.abs() if 2 <= place < 6 else row.abs() for place, row in enumerate([*SIX, *SIX])]
    parts = {name: nn.Linear(4, 4) for name in ("always", "early", "late")}
    assert_true(Net(forward, **parts), data, own, batch_size=2, slow=1)


# Zeros that are not zero.


def test_torchs_fused_encoder_does_not_go_around_the_modules():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    base = Net(
        lambda self, x: self.out(self.encoder(x).mean(1)),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        out=nn.Linear(4, 1),
    )
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False)).double()
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    expected = truth(model, SEQUENCES, own, [n for n, p in model.named_parameters() if p.requires_grad])
    torch.backends.mha.set_fastpath_enabled(was)
    fast = datainf.per_sample_gradients(model, SEQUENCES, own, dtype=torch.float64)
    slow = datainf.reference_gradients(model, SEQUENCES, own)
    for name, rows in expected.items():
        assert rows.norm() > 0
        torch.testing.assert_close(fast[name], rows)
        torch.testing.assert_close(slow[name], rows)
    assert torch.backends.mha.get_fastpath_enabled() == was


def test_reentrant_checkpointing_above_the_chosen_layers():
    def forward(self, x):
        return checkpoint(lambda h: self.high(h.tanh()), self.low(x), use_reentrant=True).sum(1)

    model = Net(forward, low=nn.Linear(4, 4), high=nn.Linear(4, 4))
    found = datainf.per_sample_gradients(model, SIX, own, layers=["high.weight"], dtype=torch.float64)
    plain = Net(lambda self, x: self.high(self.low(x).tanh()).sum(1), low=nn.Linear(4, 4), high=nn.Linear(4, 4))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(found["high.weight"], truth(plain, SIX, own, ["high.weight"])["high.weight"])


class Unbiased(nn.Module):
    """Names with "bias" in them, of which one is a bias."""

    def __init__(self):
        super().__init__()
        self.unbiased, self.position_bias_table = (nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5, 4)))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return ((x + self.position_bias_table) * self.unbiased + self.bias).tanh().sum((1, 2))


def test_only_biases_are_biases():
    found = assert_true(Unbiased().double(), SEQUENCES, own)
    assert set(found) == {"unbiased", "position_bias_table"}
    names = list(datainf.per_sample_gradients(Net(recurrent, **TOLD_APART_ALONE["GRU"][1]), SEQUENCES, own))
    assert names == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"]


def test_an_adapter_that_takes_no_part_is_named(make_model, token_examples, pad_collate):
    def refused(sentence, model):
        for take in (datainf.per_sample_gradients, datainf.reference_gradients):
            with pytest.raises(ValueError, match=sentence) as caught:
                take(model, token_examples, classification, collate_fn=pad_collate)
            assert "\n" not in str(caught.value)

    model = make_model("roberta")
    model.merge_adapter()
    refused("Adapter 'default' is merged into the base, so layer .* call model.unmerge_adapter", model)
    model.unmerge_adapter()
    with model.disable_adapter():
        model.base_model.model.requires_grad_(True)
        refused("adapters are switched off", model)
    model = make_model("roberta")
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["value"], init_lora_weights=False)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    refused("Adapter 'other' is not active, so layer .*model.set_adapter", model)
    active = datainf.per_sample_gradients(
        model, token_examples, classification, collate_fn=pad_collate, layers=r"lora_.\.default"
    )
    assert all(G.any() for G in active.values())


# Recording changes nothing.


def residual(self, x):
    h = self.low(x)
    h += x
    return self.high(h.tanh_()).sum(1)


def residual_of_sequences(self, x):
    h = self.high(self.low(x).tanh())
    h += x
    return h.tanh_().sum((1, 2))


def test_in_place_operations_after_the_lowest_layer():
    assert_true(Net(residual, low=nn.Linear(4, 4), high=nn.Linear(4, 4)), SIX, own, slow=0)
    # On sequences the output of a Linear is a view, whose hooks do not survive that.
    assert_true(Net(residual_of_sequences, low=nn.Linear(4, 4), high=nn.Linear(4, 4)), SEQUENCES, own, slow=0)
    images = list(torch.randn(6, 3, 6, 6, dtype=torch.float64))
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 1))
    for layers in (None, ["block.1.weight", "block.4.weight"], ["block.4.weight"]):
        assert_true(Net(lambda self, x: self.block(x), block=block), images, own, slow=0, layers=layers)


def test_an_input_that_is_changed_afterwards_is_seen():
    """Plain training refuses this itself, since it needs the input again."""

    def forward(self, x):
        h = self.low(x)
        y = self.high(h)
        h.mul_(2)
        return (y + h).tanh().sum(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        datainf.per_sample_gradients(Net(forward, low=nn.Linear(4, 4), high=nn.Linear(4, 4)), SIX, own)


def test_outputs_of_one_row_that_are_no_broadcast():
    """A recurrent state, and a prompt that is repeated by hand."""

    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(1, 2, 4))

        def forward(self):
            return self.prompt.sin()

    def repeats(self, x):
        prompt = self.prompt().repeat(len(x), 1, 1)
        return self.lin(torch.cat([prompt, x], dim=1)).tanh().sum((1, 2))

    def expands(self, x):
        prompt = self.prompt().expand(len(x), -1, -1)
        return self.lin(torch.cat([prompt, x], dim=1)).tanh().sum((1, 2))

    def adds(self, x):
        return self.lin(x[:, :2] + self.prompt()).tanh().sum((1, 2))

    def squeezes(self, x):
        return self.lin(x[:, :2] + self.prompt().squeeze(0)).tanh().sum((1, 2))

    for forward in (repeats, expands, adds, squeezes):
        assert_true(Net(forward, prompt=Prompt, lin=nn.Linear(4, 4)), SEQUENCES, own)


def test_arguments_by_keyword():
    model = Net(
        lambda self, x: self.out(self.norm(input=self.lin(input=x))),
        lin=nn.Linear(4, 4),
        norm=nn.LayerNorm(4),
        out=nn.Linear(4, 1),
    )
    assert_true(model, SIX, own, slow=0)


def state_of(model):
    return (
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
    )


def test_the_model_is_left_as_found_whatever_happens(make_model, token_examples, pad_collate, monkeypatch):
    model = make_model("roberta")
    model.base_model.model.roberta.encoder.layer[1].eval()
    before = state_of(model)

    def against_the_base(model, batch):
        with torch.no_grad(), model.disable_adapter():  # which switches requires_grad on when it ends
            reference = classification(model, batch)
        return classification(model, batch) - reference

    datainf.per_sample_gradients(model, token_examples, against_the_base, collate_fn=pad_collate)
    assert state_of(model) == before
    registered = nn.Module.register_forward_hook

    def fails_at_the_third(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("no more hooks")
        return registered(self, *args, **kwargs)

    calls = []
    monkeypatch.setattr(nn.Module, "register_forward_hook", fails_at_the_third)
    with pytest.raises(RuntimeError, match="no more hooks"):
        datainf.per_sample_gradients(model, token_examples, classification, collate_fn=pad_collate)
    assert state_of(model) == before


def test_within_inference_mode_and_no_grad(make_model, token_examples, pad_collate):
    model = make_model("roberta", dtype=torch.float64)
    arguments = {"collate_fn": pad_collate, "dtype": torch.float64}
    expected = datainf.per_sample_gradients(model, token_examples, classification, **arguments)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = datainf.per_sample_gradients(model, token_examples, classification, **arguments)
        for name, rows in expected.items():
            torch.testing.assert_close(found[name], rows)


# The rerun is the run.


def test_a_loss_that_takes_from_its_batch():
    data = [{"x": row, "y": row.sum()} for row in SIX]

    def pops(model, batch):
        return (model(batch.pop("x")).squeeze(1) - batch.pop("y")).square()

    assert_true(Net(lambda self, x: self.norm(self.out(x)), out=nn.Linear(4, 1), norm=nn.LayerNorm(1)), data, pops)


def test_lower_precision_inside_the_loss_holds_when_modules_run_again():
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.out(self.norm(self.lin(x)).tanh()).float().sum(1)

    def loss_fn(model, x):
        return model(x).square()

    model = Net(forward, lin=nn.Linear(4, 8), norm=Masked(8, 8), out=nn.Linear(8, 8)).float()
    data = [row.float() for row in SIX]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = datainf.per_sample_gradients(model, data, loss_fn)
    for name, rows in truth(model, data, loss_fn, list(found)).items():
        assert (found[name] - rows).norm() <= 0.02 * rows.norm()


# Rows that cannot be used.


def test_rows_without_a_loss_are_named_all_at_once_or_skipped(make_model, token_examples, pad_collate, tmp_path):
    model = make_model("roberta")

    def some_have_none(model, batch):
        return classification(model, batch) * torch.where(batch["input_ids"][:, 0] % 5 == 0, torch.nan, 1.0)

    bad = [i for i, row in enumerate(token_examples) if row["input_ids"][0] % 5 == 0]
    assert 1 < len(bad) < len(token_examples) - 1
    named = re.escape(f"The loss of examples {', '.join(map(str, bad))} ({len(bad)} in all) is not finite")
    for batch_size in (1, 3, 32):
        with pytest.raises(ValueError, match=named):
            datainf.per_sample_gradients(
                model, token_examples, some_have_none, collate_fn=pad_collate, batch_size=batch_size
            )
    good = [row for i, row in enumerate(token_examples) if i not in bad]
    expected = datainf.per_sample_gradients(model, good, classification, collate_fn=pad_collate)
    arguments = {"collate_fn": pad_collate, "on_bad": "skip", "batch_size": 3}
    for store in (None, tmp_path / "store"):
        kept = datainf.per_sample_gradients(model, token_examples, some_have_none, store=store, **arguments)
        assert kept.skipped == tuple(bad) and kept.n == len(good)
        for name, rows in expected.items():
            torch.testing.assert_close(kept[name], rows, rtol=1e-4, atol=1e-6)
    assert datainf.GradientStore.load(tmp_path / "store").skipped == tuple(bad)
    with pytest.raises(ValueError, match="No example of the dataset has a finite loss"):
        datainf.per_sample_gradients(model, [token_examples[i] for i in bad], some_have_none, **arguments)
    with pytest.raises(ValueError, match="on_bad must be 'raise' or 'skip', not 'drop'"):
        datainf.per_sample_gradients(model, good, classification, collate_fn=pad_collate, on_bad="drop")


def test_labels_that_are_all_masked_are_named_before_the_first_pass():
    rows = [{"input_ids": torch.arange(4), "labels": [-100, -100, 1, 2]} for _ in range(5)]
    for index in (1, 4):
        rows[index] = rows[index] | {"labels": torch.full((4,), -100)}
    with pytest.raises(
        ValueError, match=r"The loss of examples 1, 4 \(2 in all\) is not finite.*are all of them masked"
    ):
        datainf.per_sample_gradients(Net(own, lin=nn.Linear(4, 4)), rows, None)


def test_a_gradient_that_is_no_number_though_the_loss_is():
    def loss_fn(model, x):
        losses = own(model, x)
        return losses + torch.where(x[:, 0] > 0, losses - losses.detach(), 1).sqrt()  # 0, with an infinite slope

    positive = [i for i, row in enumerate(SIX) if row[0] > 0]
    with pytest.raises(ValueError, match=f"The loss of examples? {positive[0]}.* is not finite, or its gradient"):
        datainf.per_sample_gradients(Net(lambda self, x: self.lin(x), lin=nn.Linear(4, 1)), SIX, loss_fn)


@pytest.mark.parametrize("scale", [1e8, 1e-9])
def test_what_float16_loses_is_said(scale):
    model = Net(lambda self, x: self.lin(x).tanh().sum(1), lin=nn.Linear(4, 4))
    loss_fn = lambda model, x: scale * own(model, x)  # noqa: E731
    with pytest.raises(ValueError, match="in layer 'lin.weight' is lost in float16.*bfloat16 or float32"):
        datainf.per_sample_gradients(model, SIX, loss_fn, dtype=torch.float16)
    datainf.per_sample_gradients(model, SIX, own, dtype=torch.float16)
    datainf.per_sample_gradients(model, SIX, loss_fn, dtype=torch.bfloat16)


# Kinds of datasets and models.


def test_kinds_of_datasets(make_model, token_examples, pad_collate):
    model = make_model("roberta", dtype=torch.float64)
    take = partial(datainf.per_sample_gradients, model, loss_fn=classification, collate_fn=pad_collate)
    expected = take(token_examples)
    table = Dataset.from_list(token_examples)
    for same in (table, table.to_dict(), pd.DataFrame(token_examples), np.array(token_examples, dtype=object)):
        for name, rows in take(same).items():
            torch.testing.assert_close(rows, expected[name])
    for other, sentence in {
        "a stream": (table.to_iterable_dataset(), "a IterableDataset has no length"),
        "a generator": ((row for row in token_examples), "a generator has no length"),
        "a loader": (torch.utils.data.DataLoader(token_examples), "a DataLoader has no length or no numbers"),
        "splits": ({"train": table}, r"a dict of splits: give one of them, such as \['train'\]"),
        "columns": ({"a": [1, 2], "b": [1]}, "columns are not of one length"),
    }.values():
        with pytest.raises(ValueError, match=sentence):
            take(other)


def test_text_that_a_collator_does_not_take_is_named(make_model, token_examples):
    def tensors(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    rows = [{"input_ids": [2, 3, 4], "labels": 1, "sentence": "left over"} for _ in token_examples]
    with pytest.raises(ValueError, match=r"text in 'sentence' \(.*\): remove .*dataset.remove_columns\(\['sentence'\]"):
        datainf.per_sample_gradients(make_model("roberta"), rows, classification, collate_fn=tensors)


def test_an_offloaded_model_is_refused(make_model, token_examples, pad_collate):
    model = cpu_offload(make_model("roberta").eval(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="is offloaded: load the model whole"):
        datainf.per_sample_gradients(model, token_examples, classification, collate_fn=pad_collate)


def test_gradient_checkpointing_is_said_to_be_off(make_model, token_examples, pad_collate):
    model = make_model("roberta")
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.warns(UserWarning, match="Gradient checkpointing is switched on, but"):
        datainf.per_sample_gradients(model, token_examples, classification, collate_fn=pad_collate)


# Is it of the same?


def scaled(model, batch, by=1.0):
    return by * classification(model, batch)


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, model, batch):
        return self.by * classification(model, batch)


def made(text):
    """A function as a notebook's cell defines it."""
    scope = {"classification": classification, "scaled": scaled, "__name__": "__main__"}
    exec(text, scope)
    return scope["loss"]


CELL = "def loss(model, batch):\n    return {} * classification(model, batch)\n"
EDITS = {
    "a constant": (made(CELL.format(2)), made(CELL.format(3)), made(CELL.format(2))),
    "a global": (
        made("BY = 2\n" + CELL.format("BY")),
        made("BY = 3\n" + CELL.format("BY")),
        made("BY = 2\n" + CELL.format("BY")),
    ),
    "a function it calls": (
        made("def f(): return 2\n" + CELL.format("f()")),
        made("def f(): return 3\n" + CELL.format("f()")),
        made("def f(): return 2\n" + CELL.format("f()")),
    ),
    "a default": (
        made("def loss(model, batch, by=2): return by * classification(model, batch)"),
        made("def loss(model, batch, by=3): return by * classification(model, batch)"),
        made("def loss(model, batch, by=2): return by * classification(model, batch)"),
    ),
    "a partial": (partial(scaled, by=2.0), partial(scaled, by=3.0), partial(scaled, by=2.0)),
    "an object": (Scaled(2), Scaled(3), Scaled(2)),
    "a bound method": (Scaled(2).__call__, Scaled(3).__call__, Scaled(2).__call__),
    "a closed-over tensor": tuple(
        (lambda weight: lambda model, batch: weight.sum() * classification(model, batch))(torch.tensor(by))
        for by in ([2.0, 1.0], [3.0, 1.0], [2.0, 1.0])
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_loss_is_another_and_the_same_one_resumes(what, make_model, token_examples, pad_collate, tmp_path):
    first, edited, again = EDITS[what]
    take = partial(
        datainf.per_sample_gradients, make_model("roberta"), token_examples, collate_fn=pad_collate, store=tmp_path
    )
    take(first)
    with pytest.raises(ValueError, match=r"something else \(differs in: loss\)"):
        take(edited)
    take(again)


def test_an_edited_collator_scaling_or_buffer_is_seen(make_model, token_examples, pad_collate, tmp_path):
    model = make_model("roberta")
    take = partial(datainf.per_sample_gradients, model, token_examples, classification, store=tmp_path)
    take(collate_fn=pad_collate)
    short = lambda rows: pad_collate([row | {"input_ids": row["input_ids"][:3]} for row in rows])  # noqa: E731
    with pytest.raises(ValueError, match=r"differs in: collate_fn"):
        take(collate_fn=short)
    value = model.base_model.model.roberta.encoder.layer[0].attention.self.value
    value.scaling["default"] *= 3
    with pytest.raises(ValueError, match=r"differs in: base"):
        take(collate_fn=pad_collate)
    value.scaling["default"] /= 3
    take(collate_fn=pad_collate)
    model.register_buffer("statistics", torch.ones(3))
    with pytest.raises(ValueError, match=r"differs in: base"):
        take(collate_fn=pad_collate)
