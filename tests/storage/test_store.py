"""The store: whole or absent, resumed after a kill, never mistaken for another."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
from layered import factors_of
from safetensors.torch import save_file

import datainf
from datainf.attribution.inputs import layer_rows
from datainf.errors import InputError
from datainf.models.losses import classification
from datainf.storage import files
from datainf.storage.shards import Shards
from datainf.storage.store import GradientStore


def example_store(n=10) -> GradientStore:
    generator = torch.Generator().manual_seed(0)
    layers = {"a": torch.randn(n, 6, generator=generator), "b": torch.randn(n, 3, generator=generator)}
    return GradientStore(layers, shapes={"a": (2, 3), "b": (3, 1)})


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
        assert other.shapes == other.mean().shapes == {"a": (2, 3), "b": (3, 1)}
        assert torch.equal(other.rows("a").tensor(slice(2, 9)), store["a"][2:9])


def test_a_layer_may_be_given_in_its_shape(tmp_path):
    store = GradientStore({"a": torch.randn(4, 2, 3, 5), "b": torch.randn(4, 6)}).save(tmp_path)
    assert store.shapes == {"a": (2, 15)} and store["a"].shape == (4, 30)


def test_a_store_of_an_earlier_version_is_gone_on_with(tmp_path):
    """Its manifest says nothing of shapes."""
    widths, shapes = {"a": 6}, {"a": (2, 3)}
    shards = Shards.create(tmp_path, 4, widths, torch.float32, shard_rows=2, shapes=shapes)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({name: value for name, value in shards.manifest.items() if name != "shapes"}))
    Shards.open(tmp_path).write(0, {"a": torch.ones(2, 6)})
    again = Shards.create(tmp_path, 4, widths, torch.float32, shard_rows=2, shapes=shapes)
    assert again.missing() == [1] and again.shapes == {}
    again.write(1, {"a": torch.ones(2, 6)})
    assert GradientStore.load(tmp_path).n == 4


def test_mean(tmp_path):
    store = example_store()
    torch.testing.assert_close(store.mean()["a"], store["a"].mean(dim=0, keepdim=True))
    assert store.mean().n == 1


def test_mean_of_parts(tmp_path):
    layers = {"a": torch.randn(5, 3, 2, 4)}  # of each example three matrices of shape (2, 4)
    wide = {"a": layers["a"].flatten(1)}
    for store in (one := GradientStore(wide, skipped=[2], shapes={"a": (6, 4)}), one.save(tmp_path, shard_bytes=1)):
        found = store.mean_of_parts(3)
        torch.testing.assert_close(found["a"], layers["a"].mean(dim=1).flatten(1))
        assert found.shapes == {"a": (2, 4)} and found.skipped == (2,)


def test_no_layer_is_read_whole_where_blocks_will_do(tmp_path, monkeypatch):
    store = example_store().save(tmp_path / "store")
    monkeypatch.setattr(GradientStore, "__getitem__", lambda self, name: pytest.fail(f"read {name}"))
    datainf.influence(store, store, memory=4000)
    assert "a" in store and "c" not in store and store.keys() == {"a", "b"}


@pytest.mark.parametrize("method", [*datainf.METHODS, "joint", "cosine"])
def test_influence_reads_a_store_on_disk_in_blocks(tmp_path, method):
    train, query = example_store(), example_store(4)
    on_disk = train.save(tmp_path / "store", shard_bytes=3 * 9 * 4)
    factors = {name: factors_of(shape) for name, shape in train.shapes.items()}
    expected = datainf.influence(train, query, method=method, factors=factors)
    found = datainf.influence(on_disk, query, method=method, factors=factors, memory=4000)
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
        GradientStore.load(tmp_path / "store")
    (tmp_path / "store" / "shard-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 10 shards are missing"):
        GradientStore.load(tmp_path / "store")
    with pytest.raises(KeyError):
        store["c"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    shards = Shards.create(tmp_path, 4, {"a": 2}, torch.float32)

    def half_write(tensors, path, metadata):
        save_file(tensors, path, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr("datainf.storage.shards.save_file", half_write)
    with pytest.raises(KeyboardInterrupt):
        shards.write(0, {"a": torch.ones(4, 2)})
    assert shards.missing() == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


CALLS = []


def dies_at_the_seventh(model, batch):
    CALLS.append(len(batch["labels"]))
    if len(CALLS) == 7:
        raise KeyboardInterrupt
    return classification(model, batch)


def test_extraction_resumes_from_whole_shards(tmp_path, make_model, token_examples, pad_collate):
    model, arguments = make_model("roberta"), {"collate_fn": pad_collate, "batch_size": 4, "shard_examples": 1}
    whole = datainf.per_sample_gradients(model, token_examples, classification, store=tmp_path / "whole", **arguments)
    CALLS.clear()
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        datainf.per_sample_gradients(model, token_examples, dies_at_the_seventh, store=cut, **arguments)
    assert len(list(cut.glob("shard-*"))) == 5  # one call compares an example with plain training
    resumed = datainf.per_sample_gradients(model, token_examples, dies_at_the_seventh, store=cut, **arguments)
    assert len(CALLS) == 7 + 1 + 7
    assert equal(resumed, whole)
    datainf.per_sample_gradients(model, token_examples, dies_at_the_seventh, store=cut, **arguments)
    assert len(CALLS) == 7 + 1 + 7  # complete: nothing is computed again


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


def test_layers_named_in_another_order_are_the_same_store(tmp_path, make_model, token_examples, pad_collate):
    model, options = (
        make_model("roberta"),
        {"collate_fn": pad_collate, "shard_examples": 4, "store": tmp_path / "store"},
    )
    names = list(datainf.per_sample_gradients(model, token_examples[:1], classification, collate_fn=pad_collate))
    store = datainf.per_sample_gradients(model, token_examples, classification, layers=names[::-1], **options)
    (tmp_path / "store" / "shard-00001.safetensors").unlink()
    again = datainf.per_sample_gradients(model, token_examples, classification, layers=set(names), **options)
    assert list(again) == list(store) == names
    for name in names:
        torch.testing.assert_close(again.rows(name).square_norms, again[name].square().sum(dim=1))


def test_a_store_without_shards_is_begun_anew_and_one_with_shards_keeps_their_size(
    tmp_path, make_model, token_examples, pad_collate, monkeypatch
):
    model, options = make_model("roberta"), {"collate_fn": pad_collate, "store": tmp_path / "store"}
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
        with pytest.raises(ValueError, match="keep them in bfloat16"):
            datainf.per_sample_gradients(model, token_examples, classification, **options)
    options |= {"dtype": torch.bfloat16}
    datainf.per_sample_gradients(model, token_examples, classification, shard_examples=5, **options)
    (tmp_path / "store" / "shard-00001.safetensors").unlink()
    datainf.per_sample_gradients(model, token_examples, classification, batch_size=2, **options)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 3


def test_a_store_of_another_format_is_refused(tmp_path):
    example_store().save(tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 1'))
    with pytest.raises(ValueError, match=r"is of another version of this package \(format 1, not 3\)"):
        GradientStore.load(tmp_path / "store")


def test_squared_norms_are_kept(tmp_path):
    store = example_store()
    loaded = store.save(tmp_path / "store", shard_bytes=3 * 9 * 4)
    for name in store:
        torch.testing.assert_close(loaded.rows(name).square_norms, store[name].square().sum(dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squared_norms_are_of_the_gradients_as_stored(tmp_path, dtype):
    store = GradientStore({name: G.to(dtype) for name, G in example_store().items()})
    loaded = store.save(tmp_path / "store")
    torch.testing.assert_close(loaded.rows("a").square_norms, store["a"].float().square().sum(dim=1).to(dtype))
    in_float32 = layer_rows(loaded, "a").square_norms
    torch.testing.assert_close(in_float32, store["a"].float().square().sum(dim=1))


def test_a_damaged_shard_is_refused(tmp_path, make_model, token_examples, pad_collate):
    arguments = (make_model("roberta"), token_examples, classification)
    options = {"collate_fn": pad_collate, "store": tmp_path / "store", "shard_examples": 5}
    store = datainf.per_sample_gradients(*arguments, **options)
    store.verify()
    shard = tmp_path / "store" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(OSError, match="shard-00001.safetensors is damaged .* delete it and call"):
        store.verify()
    with pytest.raises(OSError, match="shard-00001.safetensors is damaged"):
        datainf.per_sample_gradients(*arguments, **options)
    shard.unlink()
    datainf.per_sample_gradients(*arguments, **options).verify()


@pytest.mark.parametrize("other", ["order", "model", "layers", "place"])
def test_a_foreign_shard_is_refused(tmp_path, make_model, token_examples, pad_collate, other):
    model, options = make_model("roberta"), {"collate_fn": pad_collate, "shard_examples": 4}
    datainf.per_sample_gradients(model, token_examples, classification, store=tmp_path / "store", **options)
    if other == "order":
        token_examples = token_examples[::-1]
    if other == "model":
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1)
    if other == "layers":
        options["layers"] = "lora_A"
    datainf.per_sample_gradients(model, token_examples, classification, store=tmp_path / "foreign", **options)
    foreign = tmp_path / "foreign" / f"shard-0000{2 if other == 'place' else 1}.safetensors"
    os.replace(foreign, tmp_path / "store" / "shard-00001.safetensors")
    with pytest.raises(OSError, match="shard-00001.safetensors is another shard, or of another store"):
        GradientStore.load(tmp_path / "store")


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, another = f"{files.HOST}.{os.getpid()}", f"another-{files.HOST}.{dead.pid}"
    for process in (f"{files.HOST}.{dead.pid}", mine, another):
        half_written(tmp_path / process)
    left_by_an_older_version = half_written(tmp_path / str(dead.pid))
    Shards.create(tmp_path, 4, {"a": 2}, torch.float32)
    left = [f".shard-00000.safetensors.{process}.part" for process in (mine, another)]
    assert {path.name for path in tmp_path.glob(".*")} == {*left, left_by_an_older_version.name}


@pytest.mark.parametrize("process", ["another.1", "a.host.with.dots.1", "1", "another.no-number", f"{files.HOST}.1"])
def test_what_another_host_was_writing_is_removed_once_it_is_old(tmp_path, process):
    part, then = half_written(tmp_path / process), time.time() - 2 * 24 * 3600
    inside = part / "shard-00000.safetensors"
    os.utime(part, (then, then))
    Shards.create(tmp_path, 4, {"a": 2}, torch.float32)
    assert inside.exists()  # since something was written in it just now
    os.utime(inside, (then, then))
    os.utime(part, (then, then))
    Shards.create(tmp_path, 4, {"a": 2}, torch.float32)
    assert not part.exists()


def half_written(place):
    """A folder beside the store's files, as it is left by the process that `place` is called after."""
    folder = place.with_name(f".shard-00000.safetensors.{place.name}.part")
    folder.mkdir()
    (folder / "shard-00000.safetensors").write_bytes(b"half a shard")
    return folder


@pytest.mark.parametrize("node", ["node7.cluster.example.org", "Ann's Mac", "", "rechner-ä"])
def test_the_name_of_the_host_has_a_place_in_the_name_of_what_is_written(node, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: node)
    assert re.fullmatch("[a-zA-Z0-9_-]+", runpy.run_path(files.__file__)["HOST"])


def test_a_file_is_flushed_where_it_may_be_written(tmp_path, monkeypatch):
    """Windows refuses to flush what was opened to be read."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.write(file, b"")))
    files.write_whole(tmp_path / "a", "one\ntwo\n")
    assert flushed == [0] and (tmp_path / "a").read_bytes() == b"one\ntwo\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_home_of_nobody_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (GradientStore.load, GradientStore({"a": torch.ones(2, 3)}).save):
        with pytest.raises(InputError, match="There is no home folder for the path ~nobody-of-that-name/x: write it"):
            use("~nobody-of-that-name/x")
    assert not list(tmp_path.iterdir())


def test_a_store_of_nothing_is_refused():
    with pytest.raises(ValueError, match="A store holds one layer at least; there is none."):
        GradientStore({})
    with pytest.raises(ValueError, match="A store holds one example at least; there is none."):
        GradientStore({"a": torch.ones(0, 3)})


def test_sigkill_costs_at_most_a_shard(tmp_path):
    """A process writing shards is killed outright; what is left is a prefix of whole shards."""
    script = tmp_path / "write.py"
    script.write_text(
        textwrap.dedent("""
            import sys, torch
            from datainf.storage.shards import Shards
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


def test_a_store_that_was_opened_by_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = GradientStore({"layer": torch.randn(4, 3)}).save("gradients")
    expected = GradientStore.load("gradients")["layer"].clone()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(store["layer"], expected) and store.mean()["layer"].shape == (1, 3)


def test_a_store_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    GradientStore({"layer": torch.ones(4, 3)}).save("~/gradients")
    assert GradientStore.load("~/gradients").folder == tmp_path / "gradients"
