"""The dress rehearsal of the paper's scale, at toy shapes."""

import pandas as pd
import pytest
import torch

from benchmarks import rehearsal


@pytest.mark.parametrize("name", rehearsal.PARTS)
def test_every_stage_of_a_notebook_is_rehearsed_with_the_papers_settings(name, tmp_path, capsys):
    rehearsal.main(["--tiny", "--only", name, "--output", str(tmp_path / "record.csv")])
    record = pd.read_csv(tmp_path / "record.csv").set_index("stage")
    stages = list(record.index)
    assert "fine_tuning" in stages and stages[-1] == "whole notebook"
    gradients = record[record.index.str.startswith("gradients")]
    # A text's of three losses; the two of pictures are taken together.
    assert len(gradients) == (3 if name == "text" else 1)
    assert (gradients["paper_hours"] > 0).all() and (gradients["in_paper"] > gradients["done"]).all()
    assert {f"ihvp and scores, {method}" for method in ("hessian_free", "datainf", "exact")} <= set(stages)
    whole = record.loc["whole notebook"]
    assert whole["seconds"] > record["seconds"].drop("whole notebook").sum()
    assert whole["disk_gb"] > 0 and whole["paper_disk_gb"] > whole["disk_gb"]
    assert (record["scale"] == "tiny").all() and {"commit", "device"} <= set(record)
    assert f"{name}: fine_tuning, " in capsys.readouterr().out  # told as soon as it ended


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        rehearsal.main(["--output", str(tmp_path / "record.csv")])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "These shapes need a CUDA device: run this on a large GPU, or give --tiny.\n"
