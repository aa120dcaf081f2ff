"""The verdict: equality on one machine, tolerances elsewhere, and nothing left out in silence."""

import numpy as np
import pandas as pd
import pytest
from made_up import identification, pictures, records
from scipy import stats

from datainf.errors import InputError
from datainf.study import results, verdict
from datainf.study.provenance import ROOT

REPORTED = results.paper_reported(ROOT / "results")


@pytest.fixture
def published(tmp_path):
    """A folder of made-up records, one file for each seed, all of one machine."""
    write(tmp_path / "published", "one machine")
    return tmp_path / "published"


def write(folder, device, change=lambda frame: frame):
    """Records of all experiments and of a lesson, whose `change` is made before they are written."""
    generator = np.random.default_rng(0)
    made = {
        "approximation_error": records("approximation_error"),
        "mislabeled_detection": records("mislabeled_detection"),
        "text_identification": identification(),
        "image_identification": pictures(),
        "leave_one_out": pd.DataFrame({"method": ["exact", "datainf"], "pearson": [0.9, 0.8], "spearman": 0.7}),
    }
    for name, frame in made.items():
        noise = {
            metric: frame[metric] + generator.normal(0, 0.01, len(frame))
            for metric in ("auc", "pearson")
            if metric in frame
        }
        frame = change(frame.assign(**noise, device=device, commit="0123456789ab", seconds_ihvp=generator.random()))
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        frame.to_csv(folder / "runs" / (f"{name}.csv" if name == "leave_one_out" else f"{name}-all.csv"), index=False)
    return folder


def shifted(by, where=lambda frame: frame.index >= 0):
    """Adds `by` to the AUCs and correlations."""

    def change(frame):
        frame = frame.copy()
        for metric in {"auc", "pearson"} & set(frame.columns):
            frame.loc[where(frame), metric] += by
        return frame

    return change


def test_the_same_numbers_are_equal_whatever_took_how_long(published):
    found = verdict.verdict(published, published, REPORTED)
    assert found.holds and set(found.numbers["status"]) == set(found.claims["status"]) == {"equal"}
    assert "all published numbers and claims are equal" in found.summary()
    assert len(found.numbers[found.numbers["metric"].str.startswith("seconds")]) == 0


def test_on_one_machine_any_difference_is_outside(published, tmp_path):
    ours = write(tmp_path / "ours", "one machine", shifted(1e-6, lambda frame: frame["method"] == "exact"))
    found = verdict.verdict(published, ours, REPORTED)
    assert not found.holds and "NOT reproduced" in found.summary()
    outside = found.numbers[found.numbers["status"] == "OUTSIDE"]
    assert set(outside["method"].dropna()) == {"exact"} and (outside["tolerance"] == 0).all()
    assert "exact" in found.to_markdown("demo").split("## Claims")[0]


def test_elsewhere_the_seeds_say_how_far_a_mean_may_move(published, tmp_path):
    near = verdict.verdict(published, write(tmp_path / "near", "another", shifted(0.004)), REPORTED)
    assert near.holds and {"within"} <= set(near.numbers["status"]) <= {"within", "equal", "not judged"}
    far = verdict.verdict(published, write(tmp_path / "far", "another", shifted(0.2)), REPORTED)
    assert not far.holds
    # By hand: one method's AUC over two datasets, two ranks and three seeds.
    auc = pd.read_csv(published / "runs" / "mislabeled_detection-all.csv").query("method == 'exact'")
    variance = auc.groupby(["dataset", "rank"])["auc"].var()
    tolerance = stats.t.ppf(0.995, 4 * 2) * (variance.mean() * 2 / 3) ** 0.5
    cell = near.numbers.query("experiment == 'mislabeled_detection' and method == 'exact' and metric == 'auc'")
    np.testing.assert_allclose(cell["tolerance"], tolerance)
    np.testing.assert_allclose(cell["difference"], 0.004)


def test_what_has_one_seed_is_not_judged_elsewhere(published, tmp_path):
    ours = write(tmp_path / "ours", "another", shifted(0.001))
    found = verdict.verdict(published, ours, REPORTED).numbers
    lesson = found[found["experiment"] == "leave_one_out"]
    assert dict(lesson.set_index(["row", "metric"])["status"]) == {
        ("exact", "pearson"): "not judged",
        ("datainf", "pearson"): "not judged",
        ("exact", "spearman"): "equal",
        ("datainf", "spearman"): "equal",
    }


def test_what_was_not_run_or_diverged_is_said(published, tmp_path):
    without = write(tmp_path / "ours", "one machine", lambda frame: frame[frame["method"] != "exact"])
    found = verdict.verdict(published, without, REPORTED)
    assert set(found.numbers.query("method == 'exact' or row == 'exact'")["status"]) == {"not run"} and not found.holds
    assert set(found.claims[found.claims["claim"].str.contains("of Exact")]["status"]) == {"not run"}
    diverged = write(tmp_path / "diverged", "one machine", shifted(np.nan, lambda frame: frame["method"] == "lissa"))
    found = verdict.verdict(published, diverged, REPORTED).numbers
    assert set(found.query("method == 'lissa' and metric == 'pearson'")["status"]) == {"OUTSIDE"}
    (diverged / "runs" / "text_identification-all.csv").unlink()
    found = verdict.verdict(published, diverged, REPORTED)
    assert set(found.claims.query("claim.str.startswith('accuracy')")["status"]) == {"not run"}  # of text tasks alone
    with pytest.raises(InputError, match="There are no records in"):
        verdict.verdict(published, tmp_path / "nowhere", REPORTED)


def test_a_loss_that_was_measured_elsewhere_is_still_of_the_same_run(tmp_path):
    """Of data selection: the loss differs with the processor, and must not be what a number is known by."""
    for name, device, by in (("published", "one", 0.0), ("ours", "another", 1e-4)):
        (tmp_path / name / "runs").mkdir(parents=True)
        for record in sorted((ROOT / "results" / "published" / "demo" / "runs").glob("data_selection-*.csv")):
            frame = pd.read_csv(record)
            frame.assign(loss=frame["loss"] + by, device=device).to_csv(tmp_path / name / "runs" / record.name)
    found = verdict.verdict(tmp_path / "published", tmp_path / "ours", REPORTED)
    assert "not run" not in set(found.numbers["status"])
    reviews = found.numbers.query("dataset == 'demo-reviews'")
    assert (reviews["seeds"] == 3).all() and "not judged" not in set(reviews["status"])


def test_a_claim_may_move_as_far_as_leaving_out_a_seed_says():
    jackknife = ["12 of 16", "10 of 16", "14 of 16"]
    error = ((2 / 3) * 8) ** 0.5  # the jackknife's, by hand
    assert verdict._compared("12 of 16", "12 of 16", jackknife, same=True)["status"] == "equal"
    moved = verdict._compared("12 of 16", "13 of 16", jackknife, same=False)
    assert moved["status"] == "within" and moved["tolerance"] == pytest.approx(stats.t.ppf(0.995, 2) * error * 2**0.5)
    assert verdict._compared("12 of 16", "13 of 16", jackknife, same=True)["status"] == "OUTSIDE"
    steady = ["0.90 (sst2)"] * 3
    assert verdict._compared("0.90 (sst2)", "0.91 (sst2)", steady, same=False)["status"] == "within"  # the last digit
    assert verdict._compared("0.90 (sst2)", "0.93 (sst2)", steady, same=False)["status"] == "OUTSIDE"
    assert verdict._compared("0.90 (sst2)", "0.90 (mrpc)", steady, same=False)["status"] == "OUTSIDE"
    assert verdict._compared("1 of 2", "2 of 2", [], same=False)["status"] == "not judged"


def test_an_experiment_of_one_seed_is_not_judged_and_leaves_the_others_judged(published, tmp_path):
    one_seed = lambda frame: frame[frame["seed"] == 0] if "loss" in frame else frame  # noqa: E731
    theirs = write(tmp_path / "theirs", "one machine", one_seed)
    ours = write(tmp_path / "ours", "another", lambda frame: shifted(0.004)(one_seed(frame)))
    found = verdict.verdict(theirs, ours, REPORTED)
    assert "not judged" not in set(found.claims.query("item.str.startswith('Figure')")["status"])
    claims = found.claims.set_index("claim")["status"]
    of_one_seed = set(claims[claims.index.str.startswith("class-detection AUC of Exact")])
    assert "not judged" in of_one_seed and of_one_seed <= {"not judged", "equal"}
    assert "of a single seed, which cannot be judged" in found.summary()


def test_other_models_or_data_are_named(published, tmp_path):
    write(tmp_path / "published", "one machine", lambda frame: frame.assign(model_revision="a", data_revision="b"))
    other = lambda frame: frame.assign(model_revision="c" if "rank" in frame else "a", data_revision="b")  # noqa: E731
    found = verdict.verdict(published, write(tmp_path / "ours", "one machine", other), REPORTED)
    assert not found.holds
    assert found.summary().startswith("NOT of what was published: another model in approximation_error; another model")
    assert "another data" not in found.summary()


@pytest.mark.parametrize("scale", ["demo", "laptop"])
def test_what_is_published_is_equal_to_itself(scale):
    """Every experiment of a scale has a verdict, those without claims of the paper too."""
    place = verdict.PUBLISHED / scale
    found = verdict.verdict(place, place, results.paper_reported(ROOT / "results"))
    assert found.holds and set(found.numbers["status"]) == set(found.claims["status"]) == {verdict.EQUAL}
    assert set(found.numbers["experiment"]) >= {
        path.stem.partition("-")[0] for path in (place / "runs").glob("*-*.csv")
    }
