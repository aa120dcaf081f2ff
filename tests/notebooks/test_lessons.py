"""The teaching notebooks: their assertions hold, their solutions run, and the tracked results are what they say."""

import os

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from running import NOTEBOOKS, assert_refused, error_of, execute_with_solutions

from datainf import progress, scaling
from datainf.study import plotting, students
from datainf.study.provenance import ROOT

TABLES = ROOT / "results" / "published" / "demo" / "tables"
SMALLEST = {
    "00_influence_functions": {},
    "01_curvature_and_damping": {},
    "02_datainf_derivation": {"largest_d": 512, "epochs": 2},
    "03_per_sample_gradients": {"n_train": 16, "timing": 0.001},
    "50_complexity": {
        **{"matrix_widths": [128, 256, 512], "widths": [512, 2048, 4096, 8192], "n_wide": 64},
        **{"examples": [1024, 2048, 4096], "d_tall": 256, "wide_examples": [64, 128, 256], "d_wide": 1024},
        **{"layers": [1, 2, 4], "queries": [1, 4], "matrix_sides": [16, 32], "repeats": 1, "budget_mib": 1},
    },
    "60_speed_and_scale": {"n_train": 100, "n_validation": 10, "shard_examples": 20, "budgets_mb": [1, 3, 20]},
}


RECORDS = {
    "01_curvature_and_damping": ("leave_one_out", []),
    "02_datainf_derivation": ("theorem1", ["eigenvalues.png", "theorem1.png"]),
    "50_complexity": ("table1_complexity", ["table1_crossover.png", "table1_memory.png", "table1_time.png"]),
    "60_speed_and_scale": ("memory_budget", ["memory_budget.png", "side_by_side.png"]),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_lesson_runs_with_the_solutions_of_its_exercises(name, tmp_path):
    given = SMALLEST[name] | ({"folder": str(tmp_path)} if name in RECORDS else {})
    given |= {"cache": str(tmp_path / "cache")} if "02" in name else {}
    assert execute_with_solutions(name, tmp_path, **given) == 3
    for cell in nbformat.read(tmp_path / f"{name}.ipynb", 4).cells:
        assert not [o for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stderr"]
    if name not in RECORDS:
        return
    record, figures = RECORDS[name]
    rows = pd.read_csv(tmp_path / "runs" / f"{record}.csv")
    assert rows["commit"].notna().all() and rows["torch"].eq(torch.__version__).all()
    assert rows.equals(pd.read_csv(tmp_path / "tables" / f"{record}.csv"))
    assert sorted(path.name for path in tmp_path.glob("figures/*.png")) == figures


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("00_influence_functions", {"noise": 0.9}, "InputError: noise must be from 0.05 to 0.4, not 0.9."),
        ("01_curvature_and_damping", {"ridge": 0.0}, "InputError: ridge must be from 0.001 to 1, not 0."),
        ("02_datainf_derivation", {"largest_d": 8}, "InputError: largest_d must be from 64 to 4096, not 8."),
        ("03_per_sample_gradients", {"n_train": 2}, "InputError: n_train must be from 8 to 1024, not 2."),
        ("50_complexity", {"layers": [4, 1]}, "layers must be at least two sizes, the smallest first, not [4, 1]."),
        ("50_complexity", {"widths": [8, 16]}, "matrix_widths and widths need a size in common"),
        ("50_complexity", {"repeats": 0}, "InputError: repeats must be from 1 to 100, not 0."),
        ("60_speed_and_scale", {"budgets_mb": [9, 3]}, "budgets_mb must be at least two sizes, the smallest first"),
    ],
)
def test_what_does_not_fit_a_lesson_ends_at_once_in_one_sentence(name, given, sentence, tmp_path):
    assert_refused(sentence, name, tmp_path, **given)


def test_lessons_say_goals_exercises_and_what_comes_next():
    for name in SMALLEST:
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        assert "## Goals" in prose[0] and "**Takes**" in prose[0]
        assert "## Exercises" in prose[-1] and prose[-1].count("<details>") == 3 and "**Next:**" in prose[-1]


@pytest.mark.parametrize("name", SMALLEST)
def test_the_students_edition_has_a_cell_for_each_solution(name, tmp_path):
    students.main(tmp_path)
    notebook = nbformat.read(tmp_path / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert text.count("NotImplementedError") == 3 and "<details>" not in text and "**Next:**" in text
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


def test_the_students_edition_runs_up_to_the_first_exercise(tmp_path):
    students.main(tmp_path)
    notebook = nbformat.read(tmp_path / "00_influence_functions.ipynb", 4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "Exercise 1: write your answer in this cell" in error_of(cells)


def test_published_leave_one_out_agrees_with_the_influence_function():
    record = pd.read_csv(TABLES / "leave_one_out.csv").set_index("method")
    assert record.loc["the Hessian itself", "pearson"] > 0.99


def test_published_exponents_are_those_of_the_operations():
    exponents = pd.read_csv(TABLES / "table1_exponents.csv")
    memory, time = exponents[exponents["cost"] == "memory"], exponents[exponents["cost"] == "time"]
    assert len(memory) == len(time) == 22
    # What notebook 50 explains: a copy of the gradients weighs more than an n x n matrix.
    off = memory[(memory["measured"] - memory["expected"]).abs() > 0.3]
    assert off[["method", "sweep"]].to_numpy().tolist() == [["exact", "n < D"]]
    # Seconds are a clock's, of whatever machine made the table last; inversion gets faster per operation with its size.
    inversion = (time["method"] == "exact_by_inversion") & (time["sweep"] == "D")
    assert (time[~inversion]["measured"] - time[~inversion]["expected"]).abs().lt(0.6).all()
    assert time[inversion]["measured"].between(2, 3.3).all()


def test_peak_bytes_counts_what_is_held_at_a_time():
    assert scaling.peak_bytes(lambda: torch.zeros(1000, dtype=torch.float64)) == 8000
    one_after_the_other = scaling.peak_bytes(lambda: [torch.zeros(1000).sum().item() for _ in range(5)])
    assert 4000 < one_after_the_other < 4100
    assert scaling.peak_bytes(lambda: None) == 0


def test_cost_stops_when_it_has_enough():
    calls = []
    scaling.cost(lambda: calls.append(1), repeats=4)
    assert len(calls) == 5
    calls.clear()
    scaling.cost(lambda: calls.append(1), repeats=4, enough=0)
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_bytes_on_a_gpu():
    assert scaling.peak_bytes(lambda: torch.zeros(1000, device="cuda"), "cuda") == 4096  # rounded up to 512
    assert scaling.cost(lambda: torch.zeros(1000, device="cuda"), device="cuda")[0] > 0


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_bars_are_off_inside_and_as_before_after(before, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if before is not None:
        monkeypatch.setenv("TQDM_DISABLE", before)
    with progress.off():
        assert progress.bar(range(3)).disable
    assert os.environ.get("TQDM_DISABLE") == before


def test_power_law():
    x = np.array([1.0, 2, 4, 8])
    assert scaling.power_law(x, 3 * x**-0.5) == pytest.approx((-0.5, 3))


def test_names_at_the_ends_of_lines_do_not_overlap():
    table = pd.DataFrame({"x": [1, 2] * 4, "y": [1, 5.0, 1, 5.01, 1, 5.02, 1, 4.0], "line": list("aabbccdd")})
    looks = dict.fromkeys("abcd", ("#000000", "-", ""))
    labels = {"xlabel": "x", "ylabel": "y", "title": "t"}
    figure = plotting.lines(table, "x", "y", line="line", looks=looks, log="", **labels)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
