"""The benchmarks run, in small, and what they compare agrees. (That of a GPU: test_benchmark_gpu.py.)"""

import subprocess
import sys
from importlib.util import find_spec

import pandas as pd
import pytest
import torch

import datainf
from benchmarks import peers, published
from benchmarks.common import Stages, relative_difference
from datainf.models.losses import classification
from datainf.study.provenance import ROOT

RECORDS = ROOT / "results" / "benchmarks"


def run(module: str, *arguments: str, output) -> pd.DataFrame:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--output", str(output)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return pd.read_csv(output)


def test_against_the_plain_way(tmp_path):
    record = run(
        "benchmark", "--texts", "12", "--n", "60", "--d", "64", "--repeats", "1", output=tmp_path / "record.csv"
    )
    assert set(record["benchmark"]) == {"gradients", "datainf", "exact", "recorded"}
    assert record["ratio_to_baseline"].gt(0).all() and record["commit"].notna().all()


def test_the_papers_sizes(tmp_path):
    record = run("scale", "--tiny", "--folder", str(tmp_path), output=tmp_path / "record.csv").set_index("benchmark")
    assert list(record.index) == ["datainf in memory", "datainf from disk", "exact", "gradients for exact"]
    assert record["seconds"].gt(0).all()
    assert float(record.loc["datainf from disk", "note"].rpartition(" ")[2]) <= 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["record.csv"]  # the stores are gone


def needs(*modules: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not all(map(find_spec, modules)), reason="needs the extra 'peers'")


@needs("kronfluence", "dattri", "bergson", "dattri_llm")
def test_side_by_side(tmp_path):
    record = run("side_by_side", "--n", "24", "--m", "4", "--repeats", "1", output=tmp_path / "record.csv")
    libraries = {"kronfluence", "dattri", "bergson", "dattri-llm"}
    assert set(record["library"]) == {"training step", "ours", "published way", *libraries}


@pytest.mark.parametrize(
    ("scores", "which"),
    [
        pytest.param(peers.kronfluence_scores, {"strategy": "identity"}, marks=needs("kronfluence")),
        pytest.param(peers.bergson_scores, {"index": False}, marks=needs("bergson")),
        pytest.param(peers.bergson_scores, {"index": True}, marks=needs("bergson")),
        pytest.param(peers.dattri_llm_scores, {"attributor": "tracin"}, marks=needs("dattri_llm")),
    ],
)
def test_hessian_free_by_peers(scores, which, make_model, token_examples, pad_collate, tmp_path):
    model = make_model("roberta").eval()
    train, queries = token_examples[:8], token_examples[8:]
    found = scores(model, train, queries, pad_collate, stages=Stages(), folder=tmp_path, batch_size=3, **which)
    G, V = (
        datainf.per_sample_gradients(model, part, classification, collate_fn=pad_collate) for part in (train, queries)
    )
    assert relative_difference(found, datainf.influence(G, V, "hessian_free")) < 1e-4


@pytest.mark.parametrize(
    ("scores", "which"),
    [
        pytest.param(peers.kronfluence_scores, {"strategy": "ekfac"}, marks=needs("kronfluence")),
        pytest.param(peers.dattri_llm_scores, {"attributor": "ekfac"}, marks=needs("dattri_llm")),
    ],
)
def test_ekfac_by_peers(scores, which, make_model, token_examples, pad_collate, tmp_path):
    model = make_model("roberta").eval()
    train, queries = token_examples[:8], token_examples[8:]
    found = scores(model, train, queries, pad_collate, stages=Stages(), folder=tmp_path, **which)
    options = {"collate_fn": pad_collate}
    G, V = (datainf.per_sample_gradients(model, part, classification, **options) for part in (train, queries))
    factors = datainf.kronecker_factors(model, train, classification, **options)
    ours = datainf.influence(G, V, "ekfac", factors=factors)
    assert torch.corrcoef(torch.stack([found.flatten(), ours.flatten()]))[0, 1] > 0.9999


@pytest.mark.parametrize("method", ["hessian_free", "datainf"])
def test_the_published_way_computes_the_same(method, make_model, token_examples, pad_collate):
    model = make_model("roberta").eval()
    train, queries = token_examples[:8], token_examples[8:]
    G, V = (published.gradients(model, examples, pad_collate) for examples in (train, queries))
    found = published.scores(G, getattr(published, method)(G, V))
    ours = [
        datainf.per_sample_gradients(model, part, classification, collate_fn=pad_collate) for part in (train, queries)
    ]
    torch.testing.assert_close(found, datainf.influence(*ours, method), rtol=1e-4, atol=1e-6)


def test_stages_count_seconds_or_bytes():
    for count_bytes, expected in ((False, 0), (True, 8000)):
        stages = Stages(count_bytes)
        with stages("first"):
            torch.zeros(1000, dtype=torch.float64)
        with stages("second"):
            pass
        assert list(stages.taken) == ["first", "second"]
        assert stages.taken["first"] == expected if count_bytes else stages.taken["first"] > 0


def test_tracked_records_meet_their_limits():
    """Of whatever machine made them last."""
    scale = pd.read_csv(RECORDS / "scale.csv").set_index("benchmark")
    assert scale.loc["datainf in memory", "share_of_rate"] >= 0.6
    assert scale.loc["datainf from disk", "resident_bytes"] <= 2e9
    assert scale.loc["exact", "seconds"] < scale.loc["gradients for exact", "seconds"]
    against = pd.read_csv(RECORDS / "benchmark.csv").dropna(subset="limit")
    assert (against["ratio_to_baseline"] <= against["limit"]).all()
