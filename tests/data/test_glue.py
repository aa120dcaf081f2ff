"""Label noise by seed, folders, the hub's and the built-in tasks, and what is refused."""

import numpy as np
import pytest

from datainf.data import glue
from datainf.errors import InputError


def write_folder(folder, rows, columns=("sentence", "label"), splits=("train", "validation")):
    folder.mkdir(exist_ok=True)
    for split in splits:
        lines = ["\t".join(columns), *("\t".join(map(str, row)) for row in rows)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf8")
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "sst2", [(f'a "quoted sentence {i}', i % 2) for i in range(50)])


def test_a_folder_is_read_literally(folder):
    task = glue.load(folder, noise=0.0)
    assert task.name == "sst2" and task.columns == ("sentence",)
    assert sorted(task.train["sentence"])[0] == 'a "quoted sentence 0'
    assert len(task.train) == len(task.validation) == 50
    assert not task.flipped.any()


def test_noise_flips_the_recorded_labels_and_only_those(folder):
    clean, noisy = (glue.load(folder, noise=noise, seed=3) for noise in (0.0, 0.2))
    assert clean.train["sentence"] == noisy.train["sentence"]
    assert noisy.flipped.sum() == 10
    changed = np.array(clean.train["label"]) != np.array(noisy.train["label"])
    assert (changed == noisy.flipped).all()
    assert clean.validation["label"] == noisy.validation["label"]


def test_the_seed_decides(folder):
    first, again, other = (glue.load(folder, n_train=20, n_validation=10, seed=seed) for seed in (1, 1, 2))
    assert first.train.to_dict() == again.train.to_dict() and (first.flipped == again.flipped).all()
    assert first.train["sentence"] != other.train["sentence"]
    assert len(first.train) == 20 and len(first.validation) == 10
    assert first.revision == other.revision


def test_the_flipped_column_is_not_in_the_data(folder):
    assert glue.load(folder).train.column_names == ["sentence", "label"]


@pytest.mark.parametrize("name", glue.built_in.TASKS)
def test_built_in_tasks(name):
    task = glue.load(name, n_train=100, n_validation=50)
    assert task.columns == glue.built_in.TASKS[name]
    texts = [
        set(zip(*(split[column] for column in task.columns), strict=True)) for split in (task.train, task.validation)
    ]
    assert not texts[0] & texts[1]
    assert 0.5 <= task.majority < 0.75


def test_paper_sizes(tmp_path):
    rows = [(f"sentence {i}", i % 2) for i in range(5000)]
    assert len(glue.load(write_folder(tmp_path / "sst2", rows)).train) == 4500
    assert len(glue.load(write_folder(tmp_path / "sst2", rows)).validation) == 500
    assert len(glue.load(write_folder(tmp_path / "mine", rows)).train) == 5000


def test_the_hub_is_asked_for_a_glue_task(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        rows = {"sentence": ["a", "b", "c", "d"], "label": [0, 1, 0, 1], "idx": [0, 1, 2, 3]}
        return {split: glue.Dataset.from_dict(rows) for split in ("train", "validation", "test")}

    monkeypatch.setattr(glue.datasets, "load_dataset", load_dataset)
    task = glue.load("sst2", noise=0.5)
    assert asked == [("nyu-mll/glue", "sst2")]
    assert task.train.column_names == ["sentence", "label"] and task.flipped.sum() == 2


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch):
    def load_dataset(*arguments):
        raise ConnectionError("a long story\nover several lines")

    monkeypatch.setattr(glue.datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="could not be loaded from the hub \\(ConnectionError\\): go online, or give"):
        glue.load("qqp")


def test_bad_input_is_named_in_one_sentence(tmp_path, folder):
    def refused(message, dataset=folder, **arguments):
        with pytest.raises(InputError, match=message):
            glue.load(dataset, **arguments)

    refused("There is no dataset './nowhere'", "./nowhere")
    refused("There is no dataset 'mnli'", "mnli")
    refused("noise must be a share", noise=1.0)
    refused("n_train must be at least 2", n_train=1)
    refused("holds no validation.tsv", write_folder(tmp_path / "half", [("a", 0)], splits=["train"]))
    refused("all labels are of one class", write_folder(tmp_path / "one", [("a", 1), ("b", 1)]))
    refused("labels must be 0 and 1", write_folder(tmp_path / "three", [("a", 0), ("b", 1), ("c", 2)]))
    refused("'label' is missing", write_folder(tmp_path / "unlabelled", [("a",), ("b",)], ["sentence"]))
    refused("has the columns text, label; wanted", write_folder(tmp_path / "text", [("a", 0)], ["text", "label"]))


@pytest.mark.parametrize("name", ["mrpc", "sst2", "wnli", "qqp"])
def test_real_glue(name, real_data):
    task = glue.load(str(real_data / "glue" / name), n_train=300, n_validation=50)
    assert task.columns == glue.TASKS[name]
    assert task.flipped.sum() == 60 and len(task.train) == 300
