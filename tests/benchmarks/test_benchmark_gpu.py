"""The benchmark at the paper's sizes: its code at toy sizes, its shapes without their weights, and RoBERTa on a GPU."""

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import gpu
from datainf.gradients.layers import trainable_layers

PARTS = ["roberta float32", "roberta bfloat16", "llama bfloat16", "unet bfloat16", "influence llama"]
PARTS.append("influence roberta")


@pytest.fixture(autouse=True)
def as_they_were():
    """The switches of TensorFloat-32, which hold for the whole process, put back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_tiny_sizes_fill_the_record(tmp_path, capsys):
    gpu.main(["--tiny", "--device", "cpu", "--output", str(tmp_path / "gpu.csv")])
    record = pd.read_csv(tmp_path / "gpu.csv")
    assert list(record["benchmark"].unique()) == PARTS
    assert (record["scale"] == "tiny").all() and record["limit"].isna().all()
    numbers = record[["seconds_median", "ratio_to_baseline", "examples_per_second", "peak_bytes"]]
    assert np.isfinite(numbers).all(axis=None) and (numbers > 0).all(axis=None)
    of_influence = record["benchmark"].str.startswith("influence")
    assert (record["share_of_rate"].notna() == of_influence).all()
    assert {"device", "commit", "torch"} <= set(record)
    assert "FAILED" not in capsys.readouterr().out


def test_a_part_that_fails_is_one_line_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    def no_room(tiny):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(gpu, "roberta", no_room)
    arguments = ["--tiny", "--device", "cpu", "--output", str(tmp_path / "gpu.csv")]
    with pytest.raises(SystemExit, match="^Not measured: roberta float32, roberta bfloat16.$"):
        gpu.main([*arguments, "--only", "roberta"])
    assert not (tmp_path / "gpu.csv").exists()
    printed = capsys.readouterr().out.splitlines()
    assert "roberta float32: FAILED, OutOfMemoryError: CUDA out of memory." in printed
    assert "roberta bfloat16: FAILED, OutOfMemoryError: CUDA out of memory." in printed
    gpu.main([*arguments, "--only", "influence"])
    assert list(pd.read_csv(tmp_path / "gpu.csv")["benchmark"].unique()) == PARTS[4:]


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--output", str(tmp_path / "gpu.csv")])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "These sizes need a CUDA device: run this on a large GPU, or give --tiny.\n"
    assert not (tmp_path / "gpu.csv").exists()


@pytest.mark.parametrize(
    "make, parameters, layers, widths",
    [
        (gpu.roberta, 356e6, 48, {8192}),
        (gpu.llama, 13.02e9, 160, {40960}),
        (gpu.unet, 860e6, 256, {1280, 2560, 3072, 5120}),
    ],
)
def test_full_sizes_are_those_of_the_models(make, parameters, layers, widths):
    """On the device that holds no numbers."""
    model = gpu.adapted(make(tiny=False), torch.bfloat16, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.01)
    adapter = trainable_layers(model, gpu.ADAPTER)
    assert len(adapter) == layers and widths <= {weight.numel() for weight in adapter.values()}
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    base = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert {(weight.dtype, weight.device.type) for weight in base} == {(torch.bfloat16, "meta")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_roberta_large_is_measured(tmp_path):
    gpu.main(["--only", "roberta", "--output", str(tmp_path / "gpu.csv")])
    record = pd.read_csv(tmp_path / "gpu.csv")
    assert list(record["benchmark"].unique()) == PARTS[:2]
    assert (record["scale"] == "full").all() and np.isfinite(record["ratio_to_baseline"]).all()
    assert record["limit"].notna().sum() == 4
    assert record["device"].str.contains("CPU").sum() == 0
