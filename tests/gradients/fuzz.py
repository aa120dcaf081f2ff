"""Random models and batches, by hypothesis: gradients are those of plain training, or are refused in one sentence.

python -m tests.gradients.fuzz --seconds 3600        # and tells how many were tried, refused and wrong
"""

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial

import peft
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import datainf
from datainf.errors import InputError

WIDTH, VOCABULARY = 4, 7
TOLERANCE = 1e-5


# --- Parts: each takes (batch, time, WIDTH) to the same, some of them wrongly on purpose -----------------------------


class Apply(nn.Module):
    """Some modules, and a function of them and of x."""

    def __init__(self, function: Callable, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * (self.weight > 0), self.bias)


class Table(nn.Module):
    """A parameter that is used as it is."""

    def __init__(self, *shape: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(*shape))

    def forward(self):
        return self.table


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def by_place(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.places(torch.arange(x.shape[1]))


def by_place_of_one(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.places(torch.arange(x.shape[1])[None])


def experts(m: nn.Module, x: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    chosen = flat[:, 0] > 0
    out = torch.zeros_like(flat)
    out[chosen], out[~chosen] = m.one(flat[chosen]), m.other(flat[~chosen])
    return out.view_as(x)


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    h = m.lin(x)
    h += 1
    return h.tanh_()


def residual(m: nn.Module, x: Tensor) -> Tensor:
    h = m.lin(x)
    h += x
    return h


PARTS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "keyword": lambda: Apply(lambda m, x: m.lin(input=x), lin=linear()),
    "masked": lambda: Masked(WIDTH, WIDTH),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "twice": lambda: Apply(lambda m, x: m.lin(m.lin(x).tanh()), lin=linear()),
    "tied": lambda: Apply(lambda m, x: m.lin(x).tanh() @ m.lin.weight, lin=linear()),
    "time first": lambda: Apply(lambda m, x: m.lin(x.transpose(0, 1)).transpose(0, 1), lin=linear()),
    "flat": lambda: Apply(lambda m, x: m.lin(x.flatten(0, 1)).view_as(x), lin=linear()),
    "windows": lambda: Apply(lambda m, x: m.lin(x.reshape(-1, 1, WIDTH)).view_as(x), lin=linear()),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "convolution": lambda: Apply(
        lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), conv=nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    ),
    "picture": lambda: Apply(
        lambda m, x: m.conv(x[:, None]).mean(1), conv=nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    ),
    "plain picture": lambda: Apply(lambda m, x: m.conv(x[:, None]).mean(1), conv=nn.Conv2d(1, 2, 3, padding=1)),
    "groups": lambda: Apply(
        lambda m, x: m.norm(m.conv(x.transpose(1, 2))).transpose(1, 2),
        conv=nn.Conv1d(WIDTH, WIDTH, 1, groups=2),
        norm=nn.GroupNorm(2, WIDTH),
    ),
    "gru": lambda: Apply(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "gru, time first": lambda: Apply(
        lambda m, x: m.rnn(x.transpose(0, 1))[0].transpose(0, 1), rnn=nn.GRU(WIDTH, WIDTH)
    ),
    "lstm's state": lambda: Apply(
        lambda m, x: x + m.rnn(x)[1][0][-1][:, None], rnn=nn.LSTM(WIDTH, WIDTH, batch_first=True)
    ),
    "attention": lambda: Apply(lambda m, x: m.mha(x, x, x)[0], mha=nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
    "attention, time first": lambda: Apply(
        lambda m, x: m.mha(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), mha=nn.MultiheadAttention(WIDTH, 2)
    ),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True),
    "places": lambda: Apply(by_place, places=nn.Embedding(12, WIDTH)),
    "places of one row": lambda: Apply(by_place_of_one, places=nn.Embedding(12, WIDTH)),
    "buckets": lambda: Apply(
        lambda m, x: x + m.of((x[..., 0] > 0).long() + (x[..., 1] > 0)), of=nn.Embedding(3, WIDTH)
    ),
    "experts": lambda: Apply(experts, one=linear(), other=linear()),
    "in place": lambda: Apply(in_place, lin=linear()),
    "residual": lambda: Apply(residual, lin=linear()),
    "scale": lambda: Apply(lambda m, x: x * m.by(), by=Table(WIDTH)),
    "prompt": lambda: Apply(lambda m, x: x + m.by().expand(len(x), -1, -1), by=Table(1, 1, WIDTH)),
    "repeated prompt": lambda: Apply(lambda m, x: x + m.by().repeat(len(x), 1, 1), by=Table(1, 1, WIDTH)),
    "bank": lambda: Apply(lambda m, x: x @ m.by()[0] + x @ m.by()[1], by=Table(2, WIDTH, WIDTH)),
    "checkpoint": lambda: Apply(lambda m, x: checkpoint(m.lin, x, use_reentrant=False), lin=linear()),
    "not used": lambda: Apply(lambda m, x: x, lin=linear()),
    "bilinear": lambda: Apply(lambda m, x: m.form(x, x.flip(1)), form=nn.Bilinear(WIDTH, WIDTH, WIDTH)),
    "detached": lambda: Apply(lambda m, x: x + m.lin(x).detach(), lin=linear()),
}
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "statistics": lambda: Apply(lambda m, x: m.lin(x - x.mean(0)), lin=linear()),
    "next example": lambda: Apply(lambda m, x: x + m.lin(x).roll(1, 0), lin=linear()),
    "batch norm": lambda: Apply(
        lambda m, x: F.batch_norm(m.lin(x).transpose(1, 2), None, None, training=True).transpose(1, 2), lin=linear()
    ),
}


class Model(nn.Module):
    def __init__(self, parts: list[nn.Module], mask: bool):
        super().__init__()
        self.embed, self.parts, self.out = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(parts), nn.Linear(WIDTH, 1)
        self.mask = mask

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        x = self.embed(ids) + features
        there = (ids > 0 if self.mask else ids >= 0)[..., None]
        for part in self.parts:
            x = part(x).tanh()
        return self.out((x * there).sum(1) / there.sum(1)).squeeze(1)


LOSSES: dict[str, Callable] = {
    "square": lambda model, batch: model(**batch).square(),
    "with a penalty": lambda model, batch: model(**batch).square() + 0.1 * next(model.parameters()).square().sum(),
    "takes from the batch": lambda model, batch: model(batch.pop("ids"), batch.pop("features")).square(),
    "called twice": lambda model, batch: (model(**batch) - model(batch["ids"].flip(1), batch["features"])).square(),
    "contrastive": lambda model, batch: F.cross_entropy(
        model(**batch)[:, None] * model(**batch)[None], torch.arange(len(batch["ids"])), reduction="none"
    ),
}
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda **k: peft.LoraConfig(r=2, init_lora_weights=False, **k),
    "rslora": lambda **k: peft.LoraConfig(r=2, use_rslora=True, init_lora_weights=False, **k),
    "dora": lambda **k: peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **k),
    "loha": lambda **k: peft.LoHaConfig(r=2, init_weights=False, **k),
    "lokr": lambda **k: peft.LoKrConfig(r=2, init_weights=False, **k),
    "oft": lambda **k: peft.OFTConfig(r=0, oft_block_size=2, init_weights=False, **k),
    "ia3": lambda **k: peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **k),
    "vera": lambda **k: peft.VeraConfig(r=2, **k),
}


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Padded with zeros."""
    ids, features = ([row[name] for row in rows] for name in ("input_ids", "features"))
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {"ids": pad(ids), "features": pad(features)}


@st.composite
def cases(draw) -> dict:
    """A model with data, a loss and arguments."""
    names = draw(st.lists(st.sampled_from([*PARTS, *PARTS, *MIXERS]), min_size=1, max_size=4))
    alike = draw(st.booleans())
    lengths = st.integers(1, 8)
    n = draw(st.integers(1, 7))
    size = [draw(lengths)] * n if alike else draw(st.lists(lengths, min_size=n, max_size=n))
    return {
        "names": names,
        "mask": draw(st.booleans()),
        "adapter": draw(st.sampled_from([None, None, *ADAPTERS])),
        "loss": draw(st.sampled_from([*LOSSES, *["square"] * 6])),
        "size": size,
        "batch_size": draw(st.integers(1, 8)),
        "seed": draw(st.integers(0, 2**16)),
        "share": draw(st.sampled_from([1.0, 1.0, 0.5])),
    }


def made(case: dict) -> tuple[nn.Module, list[dict], Callable]:
    torch.manual_seed(case["seed"])
    parts = [(PARTS | MIXERS)[name]() for name in case["names"]]
    model = Model(parts, case["mask"])
    if case["adapter"]:
        targets = [name for name, module in model.named_modules() if type(module) is nn.Linear and "mha" not in name]
        model = peft.get_peft_model(model, ADAPTERS[case["adapter"]](target_modules=targets))
    model = model.double()
    # As many of the trainable weights as are asked for; the others stay as they are.
    for parameter in model.parameters():
        if parameter.requires_grad and torch.rand(()) > case["share"]:
            parameter.requires_grad_(False)
    data = [
        {"input_ids": torch.randint(1, VOCABULARY, (k,)), "features": torch.randn(k, WIDTH).double()}
        for k in case["size"]
    ]
    return model, data, LOSSES[case["loss"]]


def truth(model: nn.Module, data: list[dict], loss_fn: Callable, names: list[str]) -> dict[str, Tensor]:
    """By plain autograd, one example at a time."""
    model.eval()
    parameters = dict(model.named_parameters())
    wanted, rows = [parameters[name] for name in names], []
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for row in data:
            loss = loss_fn(model, collate([row])).sum()
            rows.append([g.flatten() for g in torch.autograd.grad(loss, wanted, materialize_grads=True)])
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(names)}


def outcome(case: dict) -> str:
    """What becomes of a case: exact, slow (exact, some of it one example at a time), refused or void (plain training
    fails too, or there is nothing to train); an AssertionError if it is wrong."""
    try:
        model, data, loss_fn = made(case)
        names = [name for name, p in model.named_parameters() if p.requires_grad and not name.endswith("bias")]
        names = [name for name in names if "bias" not in name.rpartition(".")[2]]
        if not names:
            return "void"
        expected = truth(model, data, loss_fn, names)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return "void"
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    arguments = {"collate_fn": collate, "batch_size": case["batch_size"], "dtype": torch.float64}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = datainf.per_sample_gradients(model, data, loss_fn, **arguments)
        except (InputError, ValueError) as error:
            assert "\n" not in str(error).strip(), f"more than one sentence: {error}"
            return "refused"
        finally:
            after = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert after == before, "the model is not as it was found"
    assert set(found) == set(names), "other layers"
    for name in names:
        apart, size = (found[name] - expected[name]).norm(dim=1), expected[name].norm(dim=1)
        largest = torch.stack([rows.norm(dim=1) for rows in expected.values()]).amax(dim=0)
        assert (apart <= TOLERANCE * size + 1e-9 * largest + 1e-12).all(), f"layer {name} is wrong by {apart.max():.3g}"
    return "slow" if any("one example at a time" in str(warning.message) for warning in said) else "exact"


def fuzz(seconds: float, first: int) -> Counter:
    """Try cases for so long; how many had which outcome.

    Raises:
        AssertionError: a case is wrong; hypothesis shows the smallest it finds.
    """
    counts, until = Counter(), time.monotonic() + seconds
    number = first
    while time.monotonic() < until:

        @seed(number)
        @settings(
            max_examples=25, deadline=None, database=None, print_blob=False, suppress_health_check=list(HealthCheck)
        )
        @given(cases())
        def one(case: dict) -> None:
            counts[outcome(case)] += 1

        one()
        number += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Try random models against plain training.")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = fuzz(options.seconds, options.seed)
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{sum(counts.values())} cases from seed {options.seed}: {told}, 0 wrong")


if __name__ == "__main__":
    main()
