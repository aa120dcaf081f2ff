"""Extraction killed outright twenty times, at random moments of its work: at most the shard at hand is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "kill.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What the script saw; it has looked at every byte of the shards that each kill left."""
    folder = tmp_path_factory.mktemp("stores")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    shutil.rmtree(folder)  # 300 MB
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_kills_fell_into_the_work(seen):
    assert seen["kills"] == 20
    assert seen["in_write"] >= 2 and seen["before_first_batch"] >= 1
    assert seen["after_each"] == sorted(seen["after_each"]) and seen["after_each"][-1] < seen["shards"]


def test_at_most_a_shard_is_lost_to_each(seen):
    n, compared = seen["shards"] * seen["shard_examples"], 1 + 1  # with plain training, whenever it begins
    assert n <= seen["differentiated"] <= n + compared + seen["kills"] * (seen["shard_examples"] + compared)


def test_the_store_is_as_if_nothing_had_happened(seen):
    assert len(seen["files"]) == 1 + seen["shards"]  # nothing that was half written is left
    assert seen["same_bytes"]
