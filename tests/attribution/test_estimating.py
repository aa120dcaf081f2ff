"""What is said of bytes and seconds beforehand, beside what they turn out to be."""

import pytest
import torch

import datainf
from datainf import scaling
from datainf.errors import InputError
from datainf.gradients.layers import trainable_layers
from datainf.models.losses import classification


@pytest.fixture
def arguments(make_model, token_examples, pad_collate):
    examples = token_examples * 10
    return {"model": make_model("roberta"), "examples": examples, "loss_fn": classification, "collate_fn": pad_collate}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_the_store_is_exact(arguments, dtype, tmp_path):
    found = datainf.estimate(n=120, m=12, dtype=dtype, layers="lora_", **arguments)
    model, examples = arguments["model"], arguments["examples"]
    options = {"collate_fn": arguments["collate_fn"], "dtype": dtype, "layers": "lora_"}
    store = datainf.per_sample_gradients(model, examples, classification, store=tmp_path / "store", **options)
    assert found.stages["kept_bytes"]["training gradients"] == store.nbytes
    assert found.stages["kept_bytes"]["query gradients"] == store.nbytes / 10
    assert found.stages["kept_bytes"]["scores"] == 4 * 12 * 120


def test_the_seconds_are_those_of_the_probes_scaled_up(arguments, monkeypatch):
    def six_seconds(function, **options):
        function()
        return 6.0, 0

    monkeypatch.setattr(scaling, "cost", six_seconds)
    found = datainf.estimate(n=120, m=12, **arguments).stages["seconds"]
    assert found["training gradients"] == pytest.approx(120 * 6 / 96)  # three batches of 32 were probed
    assert found["query gradients"] == pytest.approx(found["training gradients"] / 10)
    assert found["scores"] == pytest.approx(6 * len(trainable_layers(arguments["model"])))  # probed as they are


@pytest.mark.parametrize("method", datainf.METHODS)
def test_every_method_is_estimated(arguments, method):
    found = datainf.estimate(n=2000, m=50, method=method, **arguments)
    assert (found.stages > 0).all(axis=None)
    more = datainf.estimate(n=20_000, m=50, method=method, **arguments)
    assert (more.stages["kept_bytes"] >= found.stages["kept_bytes"]).all()
    assert str(found).splitlines()[0].split() == ["keeps", "holds", "takes", "about"]
    assert f"ihvp, {method}" in str(found)


def test_without_examples_the_gradients_are_not_timed(arguments):
    found = datainf.estimate(arguments["model"], 100, 10)
    assert found.stages["seconds"].isna().tolist() == [True, True, False, False]
    assert "?" in str(found)


def test_memory_bounds_what_is_held_or_is_refused(arguments):
    found = datainf.estimate(arguments["model"], 10_000, 100, memory="20MB")
    assert found.stages["peak_bytes"]["scores"] <= 20e6
    with pytest.raises(
        InputError, match=r"memory=100B is too little: datainf on a layer of \d+ parameters needs at least"
    ):
        datainf.estimate(arguments["model"], 10_000, 100, memory=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, "n and m must be 1 at least, not 12 and 0."),
        ({"memory": "lots"}, "memory must be a number of bytes"),
        ({"method": "lissa", "device": "gpu"}, "The device 'gpu' cannot be used here"),
        ({"method": "datainv"}, "Unknown method 'datainv'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_probed(arguments, change, message, monkeypatch):
    monkeypatch.setattr("datainf.attribution.estimating.per_sample_gradients", None)
    with pytest.raises(ValueError, match=message):
        datainf.estimate(**{"n": 12, "m": 3} | arguments | change)


def test_long_work_is_announced_with_its_size(arguments, monkeypatch, capsys):
    """Everything is long where a microsecond is."""
    monkeypatch.setattr("datainf.progress.LONG", 1e-6)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    gradients = datainf.per_sample_gradients(
        arguments["model"], arguments["examples"], classification, collate_fn=arguments["collate_fn"]
    )
    datainf.influence(gradients, gradients.mean())
    said = capsys.readouterr().err
    assert "per-sample gradients of 120 examples, " in said and "kB in memory: about " in said
    assert "datainf, 120 x 1 examples: about " in said
