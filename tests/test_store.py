"""The store: whole or absent, resumed after a kill, never mistaken for another."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

import datainf
from datainf.losses import classification
from datainf.store import GradientStore, Shards


def example_store(n=10) -> GradientStore:
    generator = torch.Generator().manual_seed(0)
    return GradientStore({"a": torch.randn(n, 6, generator=generator), "b": torch.randn(n, 3, generator=generator)})


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("shard_bytes", [1, 3 * 9 * 4, 2**20])
def test_saved_and_loaded(tmp_path, shard_bytes):
    store = example_store()
    saved = store.save(tmp_path / "store", shard_bytes=shard_bytes)
    loaded = GradientStore.load(tmp_path / "store")
    for other in (saved, loaded):
        assert equal(other, store)
        assert other.n == 10 and other.dtype == torch.float32 and other.nbytes == store.nbytes
        assert equal(other.mean(), store.mean())
        assert torch.equal(other.rows("a").read(2, 9), store["a"][2:9])


def test_mean(tmp_path):
    store = example_store()
    torch.testing.assert_close(store.mean()["a"], store["a"].mean(dim=0, keepdim=True))
    assert store.mean().n == 1


@pytest.mark.parametrize("method", datainf.METHODS)
def test_influence_reads_a_store_on_disk_in_blocks(tmp_path, method):
    train, query = example_store(), example_store(4)
    on_disk = train.save(tmp_path / "store", shard_bytes=3 * 9 * 4)
    expected = datainf.influence(train, query, method=method)
    found = datainf.influence(on_disk, query, method=method, block_bytes=4 * 6 * 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no gradient store"):
        GradientStore.load(tmp_path)
    with pytest.raises(ValueError, match="same number of rows"):
        GradientStore({"a": torch.ones(2, 3), "b": torch.ones(3, 3)})
    store = example_store()
    store.save(tmp_path / "store", shard_bytes=1)
    with pytest.raises(FileExistsError, match="already"):
        store.save(tmp_path / "store")
    (tmp_path / "store" / "shard-00004.safetensors").write_bytes(b"half a file")
    with pytest.raises(OSError, match="shard-00004.safetensors cannot be read"):
        GradientStore.load(tmp_path / "store")["a"]
    (tmp_path / "store" / "shard-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 10 shards are missing"):
        GradientStore.load(tmp_path / "store")
    with pytest.raises(KeyError):
        store["c"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    shards = Shards.create(tmp_path, 4, {"a": 2}, torch.float32)

    def half_write(tensors, path):
        save_file(tensors, path)
        raise KeyboardInterrupt

    monkeypatch.setattr("datainf.store.save_file", half_write)
    with pytest.raises(KeyboardInterrupt):
        shards.write(0, {"a": torch.ones(4, 2)})
    assert shards.missing() == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("datainf.gradients.SHARD_BYTES", 1)


def test_extraction_resumes_from_whole_shards(tmp_path, small_shards, make_model, token_examples, pad_collate):
    model, arguments = make_model("roberta"), {"collate_fn": pad_collate, "batch_size": 4}
    whole = datainf.per_sample_gradients(model, token_examples, classification, store=tmp_path / "whole", **arguments)
    calls = []

    def dies_at_the_sixth(model, batch):
        calls.append(len(batch["labels"]))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return classification(model, batch)

    # The store knows the loss by its name; here it is the same loss, interrupted.
    dies_at_the_sixth.__qualname__ = classification.__qualname__
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        datainf.per_sample_gradients(model, token_examples, dies_at_the_sixth, store=cut, **arguments)
    assert len(list(cut.glob("shard-*"))) == 5
    resumed = datainf.per_sample_gradients(model, token_examples, dies_at_the_sixth, store=cut, **arguments)
    assert len(calls) == 12 + 1
    assert equal(resumed, whole)
    datainf.per_sample_gradients(model, token_examples, dies_at_the_sixth, store=cut, **arguments)
    assert len(calls) == 12 + 1  # complete: nothing is computed again


def test_gradients_of_something_else_are_refused(tmp_path, make_model, token_examples, pad_collate):
    model = make_model("roberta")
    arguments = {"collate_fn": pad_collate, "store": tmp_path / "store"}
    datainf.per_sample_gradients(model, token_examples, classification, **arguments)
    with pytest.raises(ValueError, match="something else \\(differs in: examples\\)"):
        datainf.per_sample_gradients(model, token_examples[::-1], classification, **arguments)
    with pytest.raises(ValueError, match="differs in: dtype"):
        datainf.per_sample_gradients(model, token_examples, classification, dtype=torch.float16, **arguments)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1e-3)
    with pytest.raises(ValueError, match="differs in: weights"):
        datainf.per_sample_gradients(model, token_examples, classification, **arguments)


def test_sigkill_costs_at_most_a_shard(tmp_path):
    """A process writing shards is killed outright; what is left is a prefix of whole shards."""
    script = tmp_path / "write.py"
    script.write_text(
        textwrap.dedent("""
            import sys, torch
            from datainf.store import Shards
            shards = Shards.create(sys.argv[1], 500, {"a": 1000}, torch.float32, shard_bytes=4000)
            for index in shards.missing():
                shards.write(index, {"a": torch.full((1, 1000), float(index))})
                print(index, flush=True)
        """)
    )
    command = [sys.executable, str(script), str(tmp_path / "store")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "20":
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    missing = Shards.open(tmp_path / "store").missing()
    assert 0 < len(missing) <= 479
    subprocess.run(command, check=True, capture_output=True)
    expected = torch.arange(500.0)[:, None].expand(500, 1000)
    assert torch.equal(GradientStore.load(tmp_path / "store")["a"], expected)
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["n"] == 500
