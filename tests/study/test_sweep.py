"""The sweep: it plans every run, hands values on as they were written, and sees when something else is asked for."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pandas as pd
import papermill
import pytest
import yaml
from running import execute
from scripts import slurm

from datainf.errors import InputError
from datainf.study import ground_truth, parameters, publish, replay, results, sweep
from datainf.study.provenance import ROOT

VARIABLES = {name: "" for names in sweep.GIVEN.values() for name in names if name}


def snakemake(*arguments: str, config: str, cwd: Path = ROOT, **variables: str) -> tuple[int, str]:
    """Exit status and all that is printed."""
    command = [sys.executable, "-m", "snakemake", *arguments, "--configfile", f"config/{config}.yaml", "--cores", "1"]
    environment = os.environ | VARIABLES | variables
    done = subprocess.run([*command, "--nolock"], cwd=cwd, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def runs(config: str) -> int:
    """How many runs of experiments a configuration asks for, counted from its grids."""
    whole = yaml.safe_load((ROOT / "config" / f"{config}.yaml").read_text(encoding="utf8"))
    if "extends" in whole:
        whole = yaml.safe_load((ROOT / "config" / f"{whole['extends']}.yaml").read_text(encoding="utf8")) | whole
    total = 0
    for _, section in sweep.EXPERIMENTS.values():
        grids = whole.get(section, {"grid": []})["grid"]
        for grid in grids if isinstance(grids, list) else [grids]:
            count = 1
            for name in grid.keys() - {"parameters"}:
                count *= len(grid[name])
            total += count
    return total


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A copy of the study in a folder whose name a shell would take apart; what is published is in it."""
    return copied(tmp_path_factory.mktemp("copies") / "it's my $tudy")


def copied(folder: Path) -> Path:
    without = shutil.ignore_patterns("__pycache__", ".snakemake", "*.egg-info")
    for name in ("datainf", "notebooks", "config", "results/published"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    for name in ("Snakefile", "results/paper_reported.csv"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("scale", ["demo", "demo-text", "laptop", "laptop-sd", "paper"])
def test_the_sweep_plans_every_run_of_a_scale_whatever_is_published(scale, study):
    status, printed = snakemake("-n", config=scale, cwd=study)
    assert status == 0, printed
    assert re.search(rf"^run\s+{runs(scale)}$", printed, re.MULTILINE)


def test_retrainings_are_spread_over_jobs(study, tmp_path):
    """As many as the section says, each run of the notebook after its own; what they do is what the notebook would."""
    whole = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text(encoding="utf8"))
    whole["ground_truth"] |= {"jobs": 3, "grid": {"dataset": ["demo-reviews"], "rank": [2], "seed": [0, 1]}}
    (study / "config" / "jobs.yaml").write_text(yaml.safe_dump(whole), encoding="utf8")
    status, printed = snakemake("-n", config="jobs", cwd=study)
    assert status == 0, printed
    assert re.search(r"^retrain\s+6$", printed, re.MULTILINE)
    run = {"n_train": 20, "n_query": 8, "epochs": 1, "repeats": 2, "halves": 3, "removals": 1, "halves_in_same": 2}
    run |= {"removals_in_same": 0, "cache": str(tmp_path)}
    command = [sys.executable, "-m", "datainf.study.ground_truth", sweep.one_line(run), "--of", "2", "--part"]
    jobs = [subprocess.Popen([*command, part], cwd=ROOT, stderr=subprocess.PIPE, text=True) for part in "01"]
    for job in jobs:  # at the same time: the first to come fine-tunes the model
        _, said = job.communicate()
        assert job.returncode == 0, said
    whole_run = parameters.defaults(ROOT / "notebooks" / "70_ground_truth.ipynb") | run
    folder = results.run_folder(tmp_path, **results.fine_tuning_key(whole_run))
    plan = ground_truth.plan(whole_run, 20)
    assert {path.stem for path in (folder / "retrainings").iterdir()} == {one.name for one in plan}


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("DATA", "There is no folder ./nowhere, which DATA names: give the datasets' folder."),
        ("MODEL", "There is no folder ./nowhere, which MODEL names: give the folder of a model."),
    ],
)
def test_a_folder_that_is_not_there_is_refused_before_anything_runs(variable, sentence):
    status, printed = snakemake("-n", config="laptop", **{variable: "./nowhere"})
    assert status != 0 and sentence in printed and "Traceback" not in printed


def test_a_folder_without_the_dataset_is_refused_before_anything_runs(tmp_path):
    status, printed = snakemake("-n", config="laptop", DATA=str(tmp_path))
    assert status != 0 and f"The folder {tmp_path} holds no dataset sst2" in printed


def test_the_sweep_refuses_a_parameter_that_no_notebook_has(study):
    config = yaml.safe_load((study / "config" / "demo.yaml").read_text(encoding="utf8"))
    config["classification"]["parameters"]["learning_rat"] = 0.1
    (study / "config" / "misspelt.yaml").write_text(yaml.safe_dump(config), encoding="utf8")
    status, printed = snakemake("-n", config="misspelt", cwd=study)
    assert status != 0 and "has no parameter 'learning_rat'" in printed


def test_values_reach_the_notebook_as_they_were_written_and_another_model_is_not_taken_for_this_one(study):
    """In a folder with a space, a quote and a dollar; by a model in another such folder."""
    model = study.parent / 'no: "1e-3" it\'s'
    shutil.copytree(study / "datainf" / "demo" / "base", model)
    small = {"n_train": 20, "n_validation": 10, "epochs": 1, "layers": "", "methods": ["hessian_free"]}
    config = yaml.safe_load((study / "config" / "demo.yaml").read_text(encoding="utf8")) | {"scale": "tiny"}
    own = {"methods": small["methods"], "layers": ""}
    config["classification"] |= {
        "parameters": {"model": "demo-roberta"} | small | {"methods": ["exact"]},
        "grid": [{"dataset": ["demo-reviews"], "rank": [1], "seed": [0], "parameters": own}],
    }
    (study / "config" / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf8")
    target = "results/tiny/runs/approximation_error-demo-reviews-r1-s0.csv"

    status, printed = snakemake(target, config="tiny", cwd=study, MODEL=str(model))
    assert status == 0, printed
    executed = study / "results" / "tiny" / "logs" / "approximation_error-demo-reviews-r1-s0.ipynb"
    given = papermill.inspect_notebook(str(executed))  # of the parameters cell; what was injected is in the metadata
    injected = nbformat.read(executed, 4).metadata.papermill.parameters
    assert {name: injected[name] for name in small} == small and injected["model"] == str(model)
    assert set(injected) <= given.keys()

    done = {"config": "tiny", "cwd": study}
    assert "Nothing to be done" in snakemake(target, "-n", **done, MODEL=str(model))[1]
    assert re.search(r"^run\s+1$", snakemake(target, "-n", **done)[1], re.MULTILINE)
    other = study.parent / "other" / model.name
    shutil.copytree(model, other)
    assert re.search(r"^run\s+1$", snakemake(target, "-n", **done, MODEL=str(other))[1], re.MULTILINE)


def test_changed_code_makes_every_run_out_of_date(study):
    """Also a detection run, which comes after the approximation error of the same model."""
    config = yaml.safe_load((study / "config" / "demo.yaml").read_text(encoding="utf8")) | {"scale": "both"}
    small = {"model": "demo-roberta", "n_train": 20, "n_validation": 10, "epochs": 1, "methods": ["hessian_free"]}
    config["classification"]["parameters"] = small
    (study / "config" / "both.yaml").write_text(yaml.safe_dump(config), encoding="utf8")
    names = ("approximation_error", "mislabeled_detection")
    targets = [f"results/both/runs/{name}-demo-reviews-r1-s0.csv" for name in names]
    done = {"config": "both", "cwd": study}
    status, printed = snakemake(*targets, **done)
    assert status == 0, printed
    assert "Nothing to be done" in snakemake(*targets, "-n", **done)[1]
    for changed, out_of_date in (("datainf/attribution/methods.py", 2), ("notebooks/20_mislabeled_detection.ipynb", 1)):
        path = study / changed
        before = path.read_text(encoding="utf8")
        code = (
            before + "\nCHANGED = True\n"
            if path.suffix == ".py"
            else before.replace("import pandas", "import re\\nimport pandas")
        )
        assert code != before
        path.write_text(code, encoding="utf8")
        printed = snakemake(*targets, "-n", **done)[1]
        path.write_text(before, encoding="utf8")
        assert re.search(rf"^run\s+{out_of_date}$", printed, re.MULTILINE), (changed, printed)


def test_a_record_repeats_its_run(tmp_path, monkeypatch):
    record = tmp_path / "runs" / "approximation_error-demo-reviews-r2-s0.csv"
    small = {"n_train": 40, "n_validation": 20, "epochs": 1, "rank": 2, "methods": ["hessian_free", "datainf"]}
    base = tmp_path / "a base"
    shutil.copytree(ROOT / "datainf" / "demo" / "base", base)
    cache = {"cache": str(tmp_path / "cache")}
    execute("10_approximation_error", tmp_path, **small, **cache, model=str(base), output=str(record))
    assert str(tmp_path) not in record.read_text(encoding="utf8")
    monkeypatch.setenv("MODEL", str(base))
    again, executed = replay.replay(record, tmp_path / "replayed")
    assert executed.is_file() and replay.differences(record, again).empty
    other = record.with_name("other.csv")
    other.write_text(record.read_text(encoding="utf8").replace(",0.", ",0.9"), encoding="utf8")
    assert len(replay.differences(other, again))


@pytest.mark.parametrize("lesson", ["leave_one_out", "theorem1"])
def test_a_lesson_repeats_its_published_record_though_its_notebook_was_renamed(lesson, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(replay.subprocess, "run", lambda command, **_: commands.append(command) or Mock(returncode=0))
    replay.replay(ROOT / "results" / "published" / "demo" / "runs" / f"{lesson}.csv", tmp_path)
    notebook, given = ROOT / commands[0][3], yaml.safe_load(commands[0][commands[0].index("-y") + 1])
    assert notebook.is_file() and given["folder"] == str(tmp_path)
    assert set(given) <= set(parameters.defaults(notebook))


def test_a_published_notebook_names_no_folder_of_the_machine(tmp_path):
    execute("01_curvature_and_damping", tmp_path, n_train=100, folder=str(tmp_path / "it's here"))
    shown = publish.shown(nbformat.read(tmp_path / "01_curvature_and_damping.ipynb", 4))
    text = "\n".join(cell.source + str(cell.get("outputs")) for cell in shown.cells)
    assert str(tmp_path) not in text and 'folder = "it\'s here"' in text
    assert "papermill" not in shown.metadata and str(ROOT) not in text


def test_only_finished_sweeps_of_committed_code_are_published(tmp_path):
    with pytest.raises(InputError, match="holds no finished sweep"):
        publish.publish(tmp_path / "demo", tmp_path / "published", [])
    for part in publish.PARTS:
        (tmp_path / "demo" / part).mkdir(parents=True)
    (tmp_path / "demo" / "tables" / "ours_beside_paper.md").touch()
    record = tmp_path / "demo" / "runs" / "a.csv"
    record.write_text("method,commit\nexact,0123456789ab+changes\n")
    with pytest.raises(InputError, match="code that is not committed"):
        publish.publish(tmp_path / "demo", tmp_path / "published", [])
    record.write_text("method,commit\nexact,0123456789ab\n")
    publish.publish(tmp_path / "demo", tmp_path / "published", [])
    assert (tmp_path / "published" / "runs" / "a.csv").is_file()


@pytest.mark.skipif(
    not (slurm.is_installed() and importlib.util.find_spec("snakemake_executor_plugin_slurm")),
    reason="needs Slurm on this machine (slurm-wlm, munge, root) and the extra 'slurm'",
)
def test_a_cluster_makes_the_records_that_one_machine_makes(tmp_path):
    """Also of a job that its limit ends on the way: it is begun again with more, and takes up what it had done."""
    study = copied(tmp_path / "my study")  # Snakemake itself cannot start a job in a folder with a dollar
    whole = yaml.safe_load((study / "config" / "demo.yaml").read_text(encoding="utf8"))
    small = {"n_train": 20, "n_query": 8, "epochs": 1, "halves": 10, "removals": 0, "removals_in_same": 0, "repeats": 4}
    small |= {"family": "classification", "folds": 0, "members": 1, "top_shares": [], "methods": ["datainf"]}
    # So many retrainings that a minute is too little for them.
    slow = {"runtime": 1, "mem_mb": 2000, "gpu": 0}
    target = "results/{}/runs/ground_truth-demo-reviews-r2-s0.csv"
    for scale, more in (("alone", {}), ("cluster", {"jobs": 1, "job": slow})):
        section = {"parameters": small | {"halves_in_same": 400, "cache": f"cache/{scale}"}}
        section["grid"] = {"dataset": ["demo-reviews"], "rank": [2], "seed": [0]}
        config = {"scale": scale, "ground_truth": section | more}
        (study / "config" / f"{scale}.yaml").write_text(yaml.safe_dump(whole | config), encoding="utf8")
    status, printed = snakemake(target.format("alone"), config="alone", cwd=study)
    assert status == 0, printed
    with slurm.cluster() as environment:
        profile = ["--profile", "config/slurm", "--slurm-no-account", "--slurm-status-command", "squeue"]
        profile += ["--latency-wait", "5", "--seconds-between-status-checks", "5"]
        profile += ["--slurm-init-seconds-before-status-checks", "5"]
        status, printed = snakemake(target.format("cluster"), *profile, config="cluster", cwd=study, **environment)
        asked = ["squeue", "--states=all", "--noheader", "--format=%T"]
        states = subprocess.run(asked, env=environment, capture_output=True, text=True).stdout.split()
    assert status == 0, printed
    assert "TIMEOUT" in states and "COMPLETED" in states, states
    one, other = (pd.read_csv(study / target.format(scale)) for scale in ("alone", "cluster"))
    numbers = ["method", "design", "lds", "low", "high", "ceiling", "auc"]
    pd.testing.assert_frame_equal(one[numbers], other[numbers])
