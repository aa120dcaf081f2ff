"""Work shared by two processes gives what one process gives."""

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from datainf import processes
from datainf.errors import InputError
from datainf.progress import OFF

SCRIPT = Path(__file__).parent / "scripts" / "share.py"
ALONE = []
# Not with --cpu: for it accelerate starts one process, whatever --num_processes says.
ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--tee=3", "--main_process_port={port}"),
]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(by: list[str], what: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != OFF}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [part.format(port=free_port()) for part in by]
    command = [sys.executable, *launcher, str(SCRIPT), what, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The folders of a run of one process and of one of two, and what the two printed."""
    runs = {}
    for name, by in (("one", ALONE), ("two", ACCELERATE)):
        runs[name] = tmp_path_factory.mktemp(name)
        process = launch(by, "work", runs[name])
        assert process.returncode == 0, process.stdout + process.stderr
        (runs[name] / "printed").write_text(process.stdout + process.stderr)
    return runs


@pytest.fixture(scope="module")
def found(runs) -> list[tuple[dict, dict]]:
    """(results, part of the work) of the one process, then of each of the two."""
    paths = [runs["one"] / "found-0.pt", runs["two"] / "found-0.pt", runs["two"] / "found-1.pt"]
    return [torch.load(path) for path in paths]


def test_stores_have_the_same_bytes(runs):
    for name in ("store", "bfloat16"):
        one, two = ({path.name: path.read_bytes() for path in (runs[run] / name).iterdir()} for run in ("one", "two"))
        assert len(one) == 4
        assert one == two


def test_gradients_and_scores_are_the_same(found):
    (one, _), *two = found
    assert len(one) == 7 + 6 * 6
    for results, _ in two:
        assert results.keys() == one.keys()
        for what, expected in one.items():
            if isinstance(expected, dict):
                assert results[what].keys() == expected.keys()
                for name, gradients in expected.items():
                    assert results[what][name].dtype == gradients.dtype
                    assert torch.equal(results[what][name], gradients), (what, name)
            else:
                error = (results[what] - expected).norm() / expected.norm()
                assert results[what].shape == expected.shape and error < 1e-6, (what, error)
                assert torch.equal(results[what], two[0][0][what]), what


def test_each_process_does_a_part(found):
    (_, alone), (_, first), (_, second) = found
    shared = {what: (first.pop(what), second.pop(what)) for what in alone if what != "layers"}
    # Batches of 4 examples; shards of 5, 5 and 2, of which the second one was lost. Each process compares two of
    # its first batch with plain training.
    assert shared == {
        "memory": (2 + 8, 2 + 4),
        "bfloat16": (2 + 8, 2 + 4),
        "one batch": (2 + 12, 0),
        "store": (2 + 7, 2 + 5),
        "bfloat16 store": (2 + 7, 2 + 5),
        "resumed": (2 + 5, 0),
    }
    assert first["layers"] and second["layers"]
    assert sorted(first["layers"] + second["layers"]) == alone["layers"]


def test_one_process_speaks(runs):
    printed = (runs["two"] / "printed").read_text()
    for words in ("per-sample gradients: 100%", "per-sample gradients of", "datainf: 100%", "datainf, 12 x 3"):
        assert words in printed
    assert "[default0]:" in printed and "[default1]:" not in printed
    assert "warn" not in printed.lower()


def test_an_error_in_one_ends_both(runs, tmp_path):
    shutil.copytree(runs["one"] / "store", tmp_path / "store")
    shard = tmp_path / "store" / "shard-00001.safetensors"  # which the second process looks at
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    process = launch(TORCHRUN, "meet_damage", tmp_path)  # which gives up on processes that wait for each other
    assert process.stdout.count("2 processes") == 2
    assert process.returncode != 0 and "shard-00001.safetensors is damaged" in process.stderr


def test_a_call_in_one_process_alone_ends_both(tmp_path):
    began = time.monotonic()
    process = launch(TORCHRUN, "alone", tmp_path)
    assert process.returncode != 0 and time.monotonic() - began < 60
    sentence = "Process 0 called per_sample_gradients, but process 1 of 2 did not within 2 seconds: call it in all of"
    assert sentence in process.stderr


THERE = {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "2 processes work together, but they did not meet (RANK is not set): start them all by torchrun"),
        (THERE | {"RANK": "one"}, "did not meet (invalid literal for int() with base 10: 'one'): start them all by"),
        ({"RANK": "0"}, "did not meet (MASTER_ADDR is not set): start them all"),
        (THERE, "1/2 clients joined): .* unset WORLD_SIZE to work alone, or let DATAINF_PATIENCE be more than 1 sec"),
        (THERE | {"RANK": "1"}, "did not meet ([Errno .* Connection refused): start them all by"),
        (THERE | {"MASTER_ADDR": "no.such.host.invalid"}, "did not meet ([Errno -.*): start them all by torchrun"),
        (THERE | {"WORLD_SIZE": "many"}, "WORLD_SIZE must be a number of processes, not 'many': unset it to"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a number of processes, not '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE must be a number of processes, not '-1'"),
        ({"DATAINF_PATIENCE": "nan"}, "DATAINF_PATIENCE must be a number of seconds, not 'nan'."),
        ({"DATAINF_PATIENCE": "0"}, "DATAINF_PATIENCE must be a number of seconds, not '0'."),
        ({"DATAINF_PATIENCE": "1e99"}, "DATAINF_PATIENCE must be a number of seconds, not '1e99'."),
    ],
)
def test_a_process_that_was_told_of_others_does_not_wait_for_ever(given, message, monkeypatch):
    monkeypatch.setattr(processes.PartialState, "_shared_state", {})  # as in a process that has not met anyone
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "DATAINF_PATIENCE": "1"} | given).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(message).replace(r"\.\*", ".*")) as caught:
        processes.rank_and_count()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["", "1"])
def test_a_process_that_was_told_of_none_is_alone(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", said)
    assert processes.rank_and_count() == (0, 1)
    processes.begin("anything")


@pytest.fixture
def store(monkeypatch):
    """The store of three processes, of which this one is number 1, before they meet for the first time."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(processes, "rank_and_count", lambda: (1, 3))
    monkeypatch.setattr(processes, "_meetings", itertools.count())
    monkeypatch.setenv("DATAINF_PATIENCE", "0.1")
    return store


def test_processes_begin_together(store):
    for meeting, other in itertools.product(range(2), (0, 2)):
        store.set(f"datainf {meeting}/{other}", "influence")
    processes.begin("influence")
    processes.begin("influence")
    with pytest.raises(InputError, match="Process 1 called influence, but process 0 of 3 did not within 0.1 seconds"):
        processes.begin("influence")


def test_processes_that_begin_different_things_are_told(store):
    store.set("datainf 0/0", "influence")
    store.set("datainf 0/2", "scores")
    with pytest.raises(InputError, match="Process 1 called influence, but process 2 called scores: call each in all."):
        processes.begin("influence")
