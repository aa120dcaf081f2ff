"""Every notebook, executed by papermill at its smallest scale, and the refusals a user meets there."""

import json
import shutil

import nbformat
import pandas as pd
import pytest
from running import NOTEBOOKS, assert_refused, execute, execute_with_solutions, run

from datainf.study.provenance import ROOT

EXPERIMENTS = {"approximation_error": "10_approximation_error", "mislabeled_detection": "20_mislabeled_detection"}
TEXT = "text_identification-math_without_reasoning-r8-s0.csv"
SMALLEST_TEXT = {"task": "math_without_reasoning", "n_train": 4, "n_test": 2, "epochs": 1}
IMAGES = "image_identification-demo-style-r1-s0.csv"
SMALLEST_IMAGES = {"n_train": 3, "n_test": 2, "size": 16, "steps": 5, "batch_size": 4, "timesteps": [225, 725]}
TRUTH = "ground_truth-demo-reviews-r2-s0.csv"
HESSIANS = TRUTH.replace("ground_truth", "which_hessian")
SMALLEST_TRUTH = {
    **{"n_train": 20, "n_query": 8, "epochs": 1, "rank": 2, "repeats": 4, "folds": 0, "members": 1, "top_shares": []},
    **{"halves": 10, "removals": 0, "halves_in_same": 20, "removals_in_same": 0},
}
SMALLEST = {"n_train": 40, "n_validation": 20, "epochs": 1, "dataset": "demo-reviews"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, diffusion_base):
    """The smallest sweep, with solutions: one dataset at two ranks, a text task, one of pictures, then the figures."""
    folder = tmp_path_factory.mktemp("study")
    for rank in (1, 2):
        for experiment, notebook in EXPERIMENTS.items():
            output = folder / "results" / "tiny" / "runs" / f"{experiment}-demo-reviews-r{rank}-s0.csv"
            given = {**SMALLEST, "rank": rank, "cache": str(folder / "cache"), "output": str(output)}
            if rank == 1:
                run(notebook, **given)
            else:
                execute_with_solutions(notebook, folder, **given)
    output = folder / "results" / "tiny" / "runs" / TEXT
    given = {**SMALLEST_TEXT, "cache": str(folder / "cache"), "output": str(output)}
    execute_with_solutions("30_text_identification", folder, **given)
    output = folder / "results" / "tiny" / "runs" / IMAGES
    given = {**SMALLEST_IMAGES, "model": diffusion_base, "cache": str(folder / "cache"), "output": str(output)}
    figures = str(folder / "results" / "tiny" / "figures")
    execute_with_solutions("40_image_identification", folder, **given, inference_steps=2, stability=1, figures=figures)
    output = folder / "results" / "tiny" / "runs" / TRUTH
    execute("70_ground_truth", folder, **SMALLEST_TRUTH, cache=str(folder / "truth"), output=str(output))
    output = folder / "results" / "tiny" / "runs" / HESSIANS
    few = {name: value for name, value in SMALLEST_TRUTH.items() if name not in ("folds", "members", "top_shares")}
    few |= {"dampings": [0.1, 10], "unrolled_queries": 1, "weighted_examples": 1, "removals_smoother": 10}
    execute("71_which_hessian", folder, **few, cache=str(folder / "truth"), output=str(output))
    execute("90_figures_and_tables", folder, folder=str(folder / "results" / "tiny"), save=True)
    return folder


def test_records_of_both_experiments(sweep):
    runs = sweep / "results" / "tiny" / "runs"
    errors = pd.read_csv(runs / "approximation_error-demo-reviews-r2-s0.csv").set_index("method")
    detection = pd.read_csv(runs / "mislabeled_detection-demo-reviews-r2-s0.csv").set_index("method")
    assert errors.loc["exact", "pearson"] == pytest.approx(1)
    assert errors["pearson"].between(-1, 1).all() and detection["auc"].between(0, 1).all()
    assert (errors["n_train"] == 40).all() and (errors["rank"] == 2).all()
    for column in ("seconds_gradients", "seconds_ihvp", "seconds_scores", "seconds_fine_tuning"):
        assert (errors[column] > 0).all()
    baselines = detection.loc[
        ["training_loss", "self_influence", "gradient_cosine", "cleanlab", "cleanlab_cross_validated"]
    ]
    assert baselines["seconds_ihvp"].isna().all() and baselines["found_50"].notna().all()
    assert baselines["seconds_scores"].idxmax() == "cleanlab_cross_validated"  # which fine-tunes twice
    assert errors["model"].unique().tolist() == ["demo-roberta"]
    assert errors["commit"].notna().all() and errors["model_revision"].str.startswith("sha256:").all()


def test_both_experiments_share_one_model_and_its_gradients(sweep):
    shared = list((sweep / "cache").glob("demo-roberta-*"))
    assert len(shared) == 2  # one for each rank, not one for each notebook
    runs = sweep / "results" / "tiny" / "runs"
    costs = [pd.read_csv(path)["seconds_gradients"][0] for path in sorted(runs.glob("*-demo-reviews-r1-s0.csv"))]
    assert costs[0] == costs[1]


def test_record_of_class_detection(sweep):
    record = pd.read_csv(sweep / "results" / "tiny" / "runs" / TEXT).set_index(["loss", "method"])
    assert len(record) == 4 * 6 + 1  # losses x methods, and the similarity of prompts
    assert record.loc[("completion", "prompt_similarity"), "auc"] > 0.99
    for column in ("auc", "auc_signed", "recall", "recall_signed"):
        assert record[column].dropna().between(0, 1).all()
    # The prompt's own gradients cannot know of another response.
    published = record.loc["as_published"]
    assert published.loc[["hessian_free", "datainf"], "prompt_preferred"].gt(0.5).all()
    assert (record["n_train"] == 40).all() and (record["n_test"] == 20).all()
    assert record["accuracy"].between(0, 1).all() and record["accuracy_base"].between(0, 1).all()
    assert (record["targets"] == "q_proj+v_proj").all() and (record["dataset"] == "math_without_reasoning").all()


def test_record_of_pictures(sweep):
    record = pd.read_csv(sweep / "results" / "tiny" / "runs" / IMAGES).set_index(["loss", "method"])
    assert len(record) == 2 * 6 + 2  # losses x methods, and the similarity of prompts and of pictures
    for column in ("auc", "auc_signed", "recall", "recall_signed"):
        assert record[column].dropna().between(0, 1).all()
    assert (record["n_train"] == 9).all() and (record["n_test"] == 6).all() and (record["steps"] == 5).all()
    assert (record[["frechet", "frechet_base"]] >= 0).all(axis=None)
    assert (record["frechet_features"] == "autoencoder").all() and (record["model"] == "tiny-diffusion").all()
    assert record["epochs"].unique() == pytest.approx(5 / 3, rel=1e-4)  # nine pictures in batches of four


def test_record_of_which_hessian(sweep):
    record = pd.read_csv(sweep / "results" / "tiny" / "runs" / HESSIANS)
    assert not record.duplicated(["design", "method"]).any()
    assert {"ekfac@0.1", "exact@0.1, true Fisher", "exact@1, lora_A", "datainf+ranks"} <= set(record["method"])
    assert record["auc"].dropna().between(0, 1).all()
    of_unrolling = record[record["method"] == "unrolled"].iloc[0]
    assert of_unrolling["lds_of_mean"] > 0.3 and of_unrolling["smoothness"] <= 1
    smoother = record[record["design"].str.contains("epsilon")].iloc[0]
    assert smoother["lds_of_mean"] > 0.5 and smoother["retrainings"] == 10


def test_figures_and_tables_are_there(sweep):
    here = sweep / "results" / "tiny"
    assert sorted(path.stem for path in (here / "figures").glob("*.png")) == [
        "class_detection_by_loss",
        "class_detection_pictures_by_loss",
        "cost",
        "damping",
        "detection_baselines",
        "detection_curves",
        "figure1_pearson",
        "figure1_spearman",
        "figure2_5_detection_auc",
        "figure3_demo-style",
        "figure4_demo-style",
        "ground_truth",
        "table2_class_detection",
        "table2_pictures",
        "template_or_answer",
    ]
    assert "DataInf correlates more than Hessian-free" in (here / "tables" / "ours_beside_paper.md").read_text()
    assert len(pd.read_csv(here / "tables" / "approximation_error.csv")) == 2 * 7
    assert "DataInf" in (here / "tables" / "table2.md").read_text()
    assert pd.read_csv(here / "tables" / "table4.csv")["n"].tolist() == [40]
    assert "0.820 ± 0.005" in (here / "tables" / "table2_pictures.md").read_text()
    assert "a perfect predictor" in (here / "tables" / "leaderboard.md").read_text()
    assert "Hessian-free" in (here / "tables" / "lds_over_datainf.md").read_text()
    assert {"AUC", "slope", "seconds"} < set(pd.read_csv(here / "tables" / "counterfactuals.csv"))
    neighbours = pd.read_csv(here / "tables" / "lds_neighbours.csv")
    assert len(neighbours) > 5 and (neighbours["seeds"] == "1 of 1")[neighbours["difference"] > 0].all()
    assert (
        "DataInf detects better than cleanlab, cross-validated"
        in (here / "tables" / "ours_beside_paper.md").read_text()
    )
    assert "LDS of DataInf" in (here / "tables" / "ours_beside_paper.md").read_text()
    assert pd.read_csv(here / "tables" / "table4_pictures.csv")["fine-tuned (paper, FID)"].tolist() == [189.6]


@pytest.mark.parametrize(
    ("record", "figure", "table"),
    [(TEXT, "table2_class_detection", "table2"), ("approximation_error-demo-reviews-r2-s0.csv", "figure1_pearson", "")],
)
def test_a_scale_of_one_experiment_has_its_figures_and_tables_alone(sweep, tmp_path, record, figure, table):
    here = tmp_path / "results" / "alone"
    (here / "runs").mkdir(parents=True)
    shutil.copy(sweep / "results" / "tiny" / "runs" / record, here / "runs")
    execute("90_figures_and_tables", tmp_path, folder=str(here), save=True)
    experiment = record.split("-")[0]
    all_tables = {
        "approximation_error.csv",
        "text_identification.csv",
        "table2.csv",
        "ground_truth.csv",
        "table2_pictures.csv",
    }
    found = {path.name for path in (here / "tables").iterdir()} & all_tables
    assert found == {f"{experiment}.csv", *([f"{table}.csv"] if table else [])}
    assert (here / "figures" / f"{figure}.png").is_file() and not (here / "figures" / "table2_pictures.png").exists()
    claims = (here / "tables" / "ours_beside_paper.md").read_text()
    assert ("Figure 1" in claims) != ("Table 2" in claims)


def test_no_executed_notebook_shows_noise(sweep):
    """No warnings, no progress of libraries, no figure twice in what a reader sees."""
    for path in sweep.glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            outputs = cell.get("outputs", [])
            assert not [o for o in outputs if o.output_type == "stream" and "Warning" in o.text]
            assert sum("image/png" in o.get("data", {}) for o in outputs) <= 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rnak": 2}, "InputError: This notebook has no parameter 'rnak'; did you mean 'rank'?"),
        ({"rank": 0}, "InputError: rank must be a whole number of at least 1, not 0."),
        ({"dataset": "./nowhere"}, "InputError: There is no dataset './nowhere'"),
        ({"dataset": "one-class"}, "all labels are of one class, so there is nothing to learn; two are needed."),
        ({"model": "./nowhere"}, "InputError: There is no folder ./nowhere"),
        ({"methods": ["datainv"]}, "Unknown method 'datainv': choose one of hessian_free"),
    ],
)
def test_what_does_not_fit_ends_at_once_in_one_sentence(given, sentence, tmp_path):
    if given.get("dataset") == "one-class":
        for split in ("train", "validation"):
            (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\ngood\t1\nfine\t1\n")
        given = {"dataset": str(tmp_path)}
    assert_refused(sentence, "10_approximation_error", tmp_path, **given)
    assert not list(tmp_path.glob("cache/*/checkpoints"))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_notebooks_are_executed_top_to_bottom(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert any("parameters" in cell.metadata.get("tags", []) for cell in code)
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)
    assert str(ROOT) not in json.dumps(notebook)
    assert "+changes" not in json.dumps([cell.outputs for cell in code])  # it says which commit it shows
