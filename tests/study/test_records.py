"""Parameters, records, metrics, tables and figures: the small parts around the experiments."""

import gc
import re
import subprocess
import sys
import time
from importlib.metadata import version

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from made_up import identification, pictures, records
from PIL import Image
from sklearn.metrics import roc_auc_score

import datainf
from datainf.errors import InputError
from datainf.evaluation import metrics, retraining
from datainf.study import parameters, plotting, provenance, publish, readme, results, tables

matplotlib.use("Agg")

DECLARED = "# The parameters of a run\nrank: int = 4\nnoise: float = 0.2\nmethods: list = ['exact']\nname: str = 'a'\n"


def notebook(injected: str) -> dict:
    """A notebook's namespace after papermill injected a cell."""
    namespace = {"In": ["", "import this", DECLARED, injected, "parameters.check(globals())"]}
    exec(DECLARED + injected, namespace)
    return namespace


def test_parameters_are_declared_and_overridden():
    assert parameters.check(notebook("# Parameters\nrank = 8\nnoise = 0\n")) == {
        "rank": 8,
        "noise": 0,
        "methods": ["exact"],
        "name": "a",
    }


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("rnak = 8", "no parameter 'rnak'; did you mean 'rank'?"),
        ("sigma = 8", "no parameter 'sigma'; there are: rank, noise, methods, name."),
        ("rank = 'two'", "'rank' must be int, not 'two'"),
        ("rank = 1.5", "'rank' must be int, not 1.5"),
        ("rank = True", "'rank' must be int, not True"),
        ("methods = 'exact'", "'methods' must be list, not 'exact'"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(injected, message):
    with pytest.raises(InputError) as caught:
        parameters.check(notebook(f"# Parameters\n{injected}\n"))
    assert message in str(caught.value)
    assert caught.value._render_traceback_() == [f"InputError: {caught.value}"]


def test_detection_metrics():
    flipped = np.array([True, False, True, False, False])
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    assert metrics.detection_auc(scores, flipped) == pytest.approx(5 / 6)
    assert np.isnan(metrics.detection_auc(np.array([np.nan, 1, 2, 3, 4]), flipped))
    curve = metrics.detection_curve(scores, flipped, points=6)
    assert curve["found"].tolist() == pytest.approx([0, 0.5, 0.5, 1, 1, 1])
    columns = metrics.found_columns(curve)
    records = pd.DataFrame([{"dataset": "d", "method": "exact", "rank": 1, "seed": 0, **columns}])
    back = metrics.curves_from(records)
    assert back["found"].tolist() == pytest.approx(curve["found"].tolist())
    assert back["inspected"].tolist() == pytest.approx(curve["inspected"].tolist())


def test_correlation():
    exact = np.array([1.0, 2.0, 3.0, 4.0])
    assert metrics.correlation(exact**3, exact)["spearman"] == pytest.approx(1)
    assert metrics.correlation(exact**3, exact)["pearson"] < 1
    assert np.isnan(metrics.correlation(np.full(4, np.inf), exact)["pearson"])
    assert np.isnan(metrics.correlation(np.ones(4), exact)["pearson"])


def test_a_stage_is_measured_once_and_remembered(tmp_path):
    freed = [torch.ones(2**18) for _ in range(200)]  # 200 MiB in pieces that the C library keeps for reuse
    del freed
    with results.stage("work", tmp_path) as first:
        held = [torch.ones(2**18) for _ in range(80)]
        time.sleep(0.05)
    assert first.seconds >= 0.05 and 79 <= first.peak_mib < 100
    del held
    with results.stage("work", tmp_path) as again:
        pass
    assert again == first


def test_imports_are_left_out_of_collections_from_the_first_stage_on():
    with results.stage("work"):
        pass
    left_out = gc.get_freeze_count()
    assert left_out > 10_000
    with retraining._only_new_garbage():
        assert gc.get_freeze_count() >= left_out
    assert gc.get_freeze_count() >= left_out


def test_the_seconds_of_a_stage_are_those_of_its_body(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("datainf.study.results.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("datainf.scaling._give_back_freed_memory", lambda: clock.append(clock.pop() + 100))
    with results.stage("work") as measured:
        clock[0] += 1
    assert measured.seconds == 1


def test_the_cost_of_a_stage_that_was_killed_is_not_known(tmp_path):
    with pytest.raises(KeyboardInterrupt), results.stage("work", tmp_path):
        raise KeyboardInterrupt
    with results.stage("work", tmp_path) as resumed:
        pass
    assert np.isnan(resumed.seconds)
    with pytest.raises(InputError), results.stage("refused", tmp_path):
        raise InputError("no")
    with results.stage("refused", tmp_path) as afresh:
        pass
    assert afresh.seconds >= 0


def test_the_run_folder_depends_on_the_key():
    key = {"model": "some/base", "dataset": "/data/mrpc", "rank": 4, "seed": 0}
    folder = results.run_folder("cache", **key)
    assert folder.name.startswith("base-mrpc-r4-s0-")
    assert folder == results.run_folder("cache", **key)
    assert folder != results.run_folder("cache", **key | {"epochs": 3})


def test_code_hash_ignores_prose(tmp_path):
    def hash_of(source, name):
        path = tmp_path / f"{name}.ipynb"
        path.write_text(f'{{"cells": [{{"cell_type": "code", "source": {source!r}}}]}}'.replace("'", '"'))
        return provenance.code_hash(path)

    assert hash_of("x = 1", "a") == hash_of("x  =  1  # one", "b") != hash_of("x = 2", "c")


def test_class_detection_metrics():
    scores = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, np.nan, 2.0, 3.0]])
    found = metrics.class_detection(scores, ["a", "b", "a", "b"], ["a", "b", "a"])
    assert found["auc"].tolist()[:2] == [0.75, 0.75] and found["recall"].tolist()[:2] == [0.5, 0.5]
    assert found.loc[2].isna().all()
    generator = np.random.default_rng(0)
    rounded = generator.normal(size=(3, 40)).round(1)  # with ties
    classes = generator.choice(list("abc"), 40)
    same = [roc_auc_score(classes == name, row) for name, row in zip("abc", rounded, strict=True)]
    assert metrics.class_detection(rounded, classes, list("abc"))["auc"].tolist() == pytest.approx(same)
    summary = metrics.mean_and_error(found.assign(auc=[0.5, 0.7, 0.9]))
    assert summary["auc"] == pytest.approx(0.7) and summary["auc_se"] == pytest.approx(0.2 / 3**0.5)


def test_preference_of_one_class_to_another():
    scores = np.array([[4.0, 1.0, 3.0, 9.0], [4.0, 1.0, 3.0, np.inf]])
    preferred = metrics.preference(scores, ["a", "b", "a", "c"], ["a", "a"], ["b", "c"])
    assert preferred[0] == 1 and np.isnan(preferred[1])
    assert metrics.preference(scores[:1], ["a", "a", "b", "c"], ["a"], ["b"])[0] == 0.5


def test_class_shares_sum_to_one_and_see_magnitudes_alone():
    scores = np.array([[3.0, -1.0, 3.0, 1.0], [-2.0, 2.0, 2.0, -2.0]])
    shares = metrics.class_shares(scores, ["x", "y", "x", "y"], ["x", "y"], order=["y", "x"])
    assert shares.to_numpy().tolist() == [[0.5, 0.5], [0.25, 0.75]]


def test_the_share_in_the_mean_is_all_of_one_direction_and_little_of_many():
    generator = torch.Generator().manual_seed(0)
    of_noise = {name: torch.randn(50, 40, generator=generator, dtype=torch.float64) for name in ("a", "b")}
    assert metrics.share_in_mean(of_noise) == pytest.approx(1 / 50, rel=0.3)
    same = {name: g[:1].expand(50, -1) for name, g in of_noise.items()}
    assert metrics.share_in_mean(same) == pytest.approx(1)
    both = {name: g + 3 for name, g in of_noise.items()}  # 9 of 10 parts, but for the noise's own mean
    assert metrics.share_in_mean(both) == pytest.approx(0.9, abs=0.02)


def test_prompt_similarity_is_of_words():
    similar = metrics.prompt_similarity(["add 3 to 4", "say hello twice"], ["add 5 to 6"])
    assert similar.shape == (1, 2) and similar[0, 0] > 0.3 and similar[0, 1] == 0


def test_table_2_and_table_4_have_ours_beside_the_papers():
    reported = results.paper_reported(provenance.ROOT / "results")
    some = identification()
    table2 = tables.class_detection(some, reported)
    row = table2.loc[("sentence_transformations", "DataInf")]
    assert row["AUC, completion"] == row["AUC, as_published"] == "0.750 ± 0.050"
    assert row["AUC (paper)"] == "1.000 ± 0.000" and row["recall (paper)"] == "0.998 ± 0.001"
    assert table2.loc[("mine", "Exact"), "AUC (paper)"] == ""
    table4 = tables.accuracy_gained(some, reported)
    assert table4.loc["math_with_reasoning", ["base", "base (paper)", "fine-tuned (paper)"]].tolist() == [
        "0.10", "0.08", "0.31",
    ]  # fmt: skip


def test_tables_of_pictures_have_the_papers_numbers_under_our_names():
    reported = results.paper_reported(provenance.ROOT / "results")
    table2 = tables.class_detection(pictures(), reported)
    assert table2.loc[("styles", "DataInf"), ["AUC, mean", "AUC (paper)"]].tolist() == [
        "0.750 ± 0.050", "0.820 ± 0.005",
    ]  # fmt: skip
    assert table2.loc[("dreambooth", "Hessian-free"), "recall (paper)"] == "0.210 ± 0.003"
    table4 = tables.distance_gained(pictures(), reported)
    assert table4.loc["styles", "runs closer"] == "2 of 2"
    assert table4.loc["styles"].tolist()[-4:] == ["4.00 ± 0.00", "3.00 ± 0.00", "243.5", "189.6"]
    own = tables.distance_gained(pictures().assign(kind="something else"), reported)
    assert own.loc["styles"].tolist()[-2:] == ["", ""]


def test_a_table_of_class_detection_ranks_scores_both_ways_and_similarities_one():
    S = np.array([[-4.0, 3.0, -2.0, 1.0], [1.0, 2.0, -3.0, -4.0]])
    classes = {"train_classes": list("abab"), "query_classes": ["a", "b"]}
    table = metrics.class_detection_table({("mean", "datainf"): S}, {("mean", "prompt_similarity"): S}, **classes)
    plain, absolute = metrics.class_detection(S, **classes), metrics.class_detection(abs(S), **classes)
    found, reference = table.loc[("mean", "datainf")], table.loc[("mean", "prompt_similarity")]
    assert found["auc"] == absolute["auc"].mean() and found["auc_signed"] == 1 - plain["auc"].mean()
    assert reference["auc"] == reference["auc_signed"] == plain["auc"].mean()
    assert found["auc_se"] == absolute["auc"].sem()


def test_picture_similarity_is_of_what_differs_from_the_mean():
    train = np.array([[[9.0, 1.0]], [[9.0, -1.0]]])
    similar = metrics.picture_similarity(train, np.array([[[9.0, 5.0]]]))
    assert similar.tolist() == [[1.0, -1.0]]


def test_most_and_least_influential_examples_are_shown():
    train = pd.DataFrame({"class": list("abc"), "prompt": list("pqr"), "response": list("xyz")})
    query = {"class": "a", "prompt": "?", "response": "!"}
    shown = tables.influential(train, query, np.array([0.1, -2.0, 1.0]), k=1).data
    assert shown[""].tolist() == ["test example", "most influential", "least influential"]
    assert shown["class"].tolist() == ["a", "b", "a"] and shown["score"].tolist() == ["", "-1", "+0.05"]


def test_records_are_written_whole_with_their_provenance(tmp_path):
    made = records("approximation_error")
    facts = dict.fromkeys(results.RUN_COLUMNS[:5], "x")
    results.save_run(tmp_path / "runs" / "approximation_error-a.csv", made, **facts)
    read = results.load_runs(tmp_path / "runs", "approximation_error")
    assert len(read) == len(made)
    assert read["commit"].notna().all() and (read["torch"] == version("torch")).all()
    assert list(read.columns[: len(results.RUN_COLUMNS)]) == results.RUN_COLUMNS
    with pytest.raises(InputError, match="needs the column 'method'"):
        results.save_run(tmp_path / "bad.csv", made.drop(columns="method"))
    of_experiment = results.load_all(tmp_path / "runs")
    assert len(of_experiment["approximation_error"]) == len(made)
    assert of_experiment["ground_truth"].empty and list(of_experiment["ground_truth"]) == results.RUN_COLUMNS
    with pytest.raises(InputError, match="nowhere holds no records: run the sweep first"):
        results.load_all(tmp_path / "nowhere")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["approximation_error-a.csv"]


def test_every_column_of_a_record_is_in_the_dictionary():
    dictionary = (provenance.ROOT / "results" / "README.md").read_text(encoding="utf8")
    tracked = list((provenance.ROOT / "results" / "published").glob("*/runs/*-s*.csv"))
    columns = set(results.RUN_COLUMNS).union(*(pd.read_csv(path, nrows=1).columns for path in tracked))
    undocumented = sorted(name for name in columns if f"`{name}`" not in dictionary and not name.startswith("found_"))
    assert undocumented == []


def test_ours_beside_the_papers_counts_cells():
    reported = results.paper_reported(provenance.ROOT / "results")
    errors, detection = records("approximation_error"), records("mislabeled_detection")
    beside = tables.ours_beside_paper(errors, detection, identification(), pictures(), reported)
    ours, verdict = (beside.set_index("claim")[name] for name in ("ours", "verdict"))
    more = "DataInf correlates more than Hessian-free (Pearson)"
    assert ours[more] == "in 4 of 4 cells (resolved in 4, against it in 0); mean 0.300 [0.300, 0.300]"
    assert verdict[more] == verdict["Hessian-free correlates more than LiSSA (10) (Spearman)"].replace("fails", "holds")
    assert ours["scaled LiSSA (10) correlates more than DataInf (Pearson)"].startswith("in 0 of 4 cells")
    assert ours["DataInf's correlation is higher at the lowest rank than at the highest"].startswith("in 2 of 2 cells")
    assert verdict["the lowest rank learns as well as the highest (accuracy, less 0.02)"] == "holds"
    assert verdict["DataInf detects about as well as Exact, or better (AUC, less 0.01)"] == "fails"
    assert ours["Pearson correlation with Exact at the lowest rank, DataInf"] == "0.79 (one), 0.79 (two)"
    of = "gradients of the response (the paper's text)"
    assert ours[f"DataInf's AUC is above Hessian-free's, {of}"].startswith("in 2 of 3 cells (resolved in 0, ")
    assert ours[f"DataInf's recall is above Hessian-free's, {of}"].startswith("in 3 of 3 cells")
    assert verdict[f"DataInf's AUC is above Hessian-free's, {of}"] == "not resolved"
    assert ours[f"class-detection AUC of Exact, {of}"].startswith("0.50 (sentence_transformations)")
    assert ours["DataInf's AUC is above Hessian-free's, gradients of the mean over timesteps"].startswith("in 1 of 2")
    distance = beside[beside["claim"].str.startswith("Fréchet")].iloc[0]
    assert distance["paper"] == "189.6, 247.5 over 243.5, 269.7"
    assert distance["ours"] == "0.75 (styles), 0.75 (dreambooth)"
    preferred = [value for claim, value in ours.items() if claim.startswith("responses exchanged")]
    assert [value[:4] for value in preferred] == ["0.40", "0.90"]
    assert tables.to_markdown(beside).count("\n") == len(beside) + 2
    assert r"by \|score\|" in tables.to_markdown(beside)


def test_figures_are_drawn():
    errors, detection = records("approximation_error"), records("mislabeled_detection")
    generator = np.random.default_rng(0)
    scores = pd.DataFrame(generator.normal(size=(30, 3)), columns=["datainf", "lissa", "exact"])
    scores["flipped"] = generator.random(30) < 0.3
    history = pd.DataFrame({"epoch": [1, 2], "loss": [0.7, 0.5], "accuracy": [0.6, 0.8]})
    points = pd.DataFrame(
        {"panel": "one", "method": ["datainf", "exact"], "kind": "by |score|", "value": 0.7, "error": 0.1}
    )
    shares = pd.DataFrame([[0.7, 0.3], [0.4, 0.6]], index=["a", "b"], columns=["a", "b"])
    measured = ("auc", "recall", "auc_signed", "recall_signed")
    detected = pd.DataFrame({name: [0.6] for metric in measured for name in (metric, f"{metric}_se")}, index=["exact"])
    settling = pd.DataFrame({"panel": "one", "method": "exact", "draws": [1, 2], "value": [0.4, 0.6]})
    figures = [
        plotting.by_rank(errors, "pearson", "correlation", "title", reference=0),
        plotting.cost(detection, "title"),
        plotting.detection_curves(metrics.curves_from(detection), "title"),
        plotting.against_exact(scores, "title"),
        plotting.detection_ranks(scores, "title"),
        plotting.fine_tuning_curve(history, 0.5),
        plotting.loss_curve(history.rename(columns={"accuracy": "query_loss"}), "epoch", "nats", "Loss"),
        plotting.by_method(points, "AUC", "title", references={"one": 0.5}, kinds={"by |score|": "full"}),
        plotting.by_loss(identification().rename(columns={"dataset": "panel", "auc": "value"}), "title"),
        plotting.class_heat_maps({"datainf": shares, "exact": shares}, "title"),
        plotting.class_detection(detected, 2, "title"),
        plotting.stability(settling, "title"),
    ]
    for figure in figures:
        figure.canvas.draw()
        assert figure.get_suptitle() or all(axis.get_title() for axis in figure.axes)
        labels = [axis.get_xlabel() + axis.get_ylabel() for axis in figure.axes]
        assert all(labels) or figure.get_supylabel() or figure.get_supxlabel() or labels[0]
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {
        "Hessian-free", "LiSSA", "LiSSA, scaled", "DataInf", "Exact",
    }  # fmt: skip


def test_figures_of_pictures_show_each_in_its_place():
    shades = [Image.new("RGB", (4, 4), (shade, shade, shade)) for shade in (10, 20, 30, 40, 50)]

    def shown(figure):
        figure.canvas.draw()
        return [int(axis.images[0].get_array()[0, 0, 0]) for axis in figure.axes]

    grid = plotting.picture_grid({"real": shades[:2], "drawn": shades[2:4]}, ["a", "b"], "title")
    assert shown(grid) == [10, 20, 30, 40] and grid.axes[2].get_ylabel() == "drawn"
    train = [(shade, name) for shade, name in zip(shades[:4], "abab", strict=True)]
    scores = np.array([[0.1, -2.0, 1.0, 0.3]])
    influential = plotting.influential_pictures([(shades[4], "a")], train, scores, "title", k=2)
    assert shown(influential) == [50, 20, 30, 10, 40]  # the largest |scores| first, the smallest from the least
    assert [axis.get_xlabel() for axis in influential.axes[1:]] == ["-1", "+0.5", "+0.05", "+0.15"]


def test_method_styles_cover_every_method_and_are_distinct():
    assert set(datainf.METHODS) <= set(plotting.METHOD_STYLE)
    for part in zip(*plotting.METHOD_STYLE.values(), strict=True):
        assert len(set(part)) == len(part)


def test_importing_the_package_is_enough():
    code = "import datainf; print(datainf.influence.__name__, datainf.GradientStore.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["influence", "GradientStore"]


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_a_page_shows_the_tracked_tables(page, tmp_path):
    """As git tracks them: results that a user has made anew need not be those in the README."""

    def tracked(path: str) -> str:
        git = ["git", "show", f":{path}"]
        return subprocess.run(git, cwd=provenance.ROOT, capture_output=True, text=True, check=True).stdout

    text = tracked(page.relative_to(provenance.ROOT).as_posix())
    paths = [match[3] for match in readme.SECTION.finditer(text)]
    assert paths or page.name not in ("README.md", "findings.md")
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(tracked(f"results/published/{path}"), encoding="utf8")
    assert readme.updated(text, tmp_path) == text


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_every_file_and_heading_that_a_page_names_is_there(page):
    for link, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", page.read_text(encoding="utf8")):
        if not link.startswith("http"):
            target = page.parent / link if link else page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf8"), re.MULTILINE) if anchor else []
            names = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert not anchor or anchor in names, (link, anchor)


EXECUTED = [*provenance.ROOT.glob("notebooks/*.ipynb"), *provenance.ROOT.glob("results/published/*/notebooks/*.ipynb")]


@pytest.mark.parametrize("path", sorted(EXECUTED), ids=lambda path: path.stem)
def test_every_file_that_a_notebook_names_is_there(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\((?!http|#)([^)#\s]+)", text):
        assert (path.parent / link).exists(), link


def test_links_of_a_published_notebook_lead_where_they_led():
    source = "[a](10_x.ipynb), [b](../docs/y.md#z), [c](https://d.e/f), [g](#h)"
    cells = [nbformat.v4.new_markdown_cell(source)]
    once = publish.shown(nbformat.v4.new_notebook(cells=cells))
    here = "[a](../../../../notebooks/10_x.ipynb), [b](../../../../docs/y.md#z), [c](https://d.e/f), [g](#h)"
    assert once.cells[0].source == here == publish.shown(once).cells[0].source
