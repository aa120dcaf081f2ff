"""Label noise by seed, folders, the hub's and the built-in tasks, and what is refused."""

import re

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


PLAIN = [f"sentence {i}\t{i % 2}" for i in range(8)]


def write_bytes(folder, lines, encoding="utf8", header="sentence\tlabel", end="\n"):
    """Both splits, of these lines."""
    for split in ("train", "validation"):
        (folder / f"{split}.tsv").write_bytes("".join(line + end for line in (header, *lines)).encode(encoding))
    return str(folder)


@pytest.mark.parametrize(
    "written",
    [
        {"encoding": "utf-8-sig"},
        {"encoding": "utf-16"},
        {"end": "\r\n"},
        {"end": "\r\r\n"},
        {"end": "\r"},
        {"end": "\n\n"},
        {"lines": [f"{line}.0" for line in PLAIN]},
        {"lines": [f"{line} " for line in PLAIN], "header": "sentence\tlabel "},
    ],
)
def test_what_is_plainly_meant_is_read(tmp_path, written):
    task = glue.load(write_bytes(tmp_path, **{"lines": PLAIN} | written), noise=0)
    rows = dict(zip(task.train["sentence"], task.train["label"], strict=True))
    assert rows == {f"sentence {i}": i % 2 for i in range(8)}
    assert task.train.features["label"].dtype == "int64"


@pytest.mark.parametrize("text", ["a\u2028b \x85 c\x0b\x0c\x1c d", "NA", "1", '"', "'a", " ", "\ufeff", "日本"])
def test_a_sentence_is_text_whatever_it_looks_like(tmp_path, text):
    lines = [f"{text}\tb {i}\t{i % 2}" for i in range(4)]
    task = glue.load(write_bytes(tmp_path, lines, header="sentence1\tsentence2\tlabel"))
    assert task.train["sentence1"][:] == [text] * 4


BAD_LINES = {
    "latin-1": ({"lines": [*PLAIN, "café\t1"], "encoding": "latin-1"}, "train.tsv, line 10 is not UTF-8 text: save"),
    "utf-16 without a mark": ({"lines": PLAIN, "encoding": "utf-16-le"}, "train.tsv, line 1 is not UTF-8 text"),
    "one more field": ({"lines": [*PLAIN, "a\tb\t1"]}, "line 10 has more fields than the header (3, not 2)."),
    "one field less": ({"lines": [*PLAIN, "", "a b"]}, "line 11 has fewer fields than the header (1, not 2)."),
    "carriage return": ({"lines": [*PLAIN, "a\rb\t1"]}, "line 10 cannot be read as a row: there is a carriage return"),
    "label in words": ({"lines": [*PLAIN, "a\tyes"]}, "line 10: labels must be 0 and 1, but this one is 'yes'."),
    "no label": ({"lines": ["a\t", *PLAIN]}, "train.tsv, line 2: labels must be 0 and 1, but this one is ''."),
    "not a number": ({"lines": [*PLAIN, "a\tnan"]}, "line 10: labels must be 0 and 1, but this one is 'nan'."),
    "half a label": ({"lines": [*PLAIN, "a\t0.5"]}, "line 10: labels must be 0 and 1, but this one is '0.5'."),
    "label of a test": ({"lines": [*PLAIN, "a\t-1"]}, "line 10: labels must be 0 and 1, but this one is '-1'."),
    "one class": ({"lines": PLAIN[::2]}, "training: all labels are of one class"),
    "no sentence": ({"lines": [*PLAIN, " \t1"]}, "line 10: the sentence is empty; write one or leave the row out."),
    "header alone": ({"lines": []}, "train.tsv has a header but no examples."),
    "nothing": ({"lines": [], "header": "", "end": ""}, "train.tsv is empty."),
    "no header": ({"lines": PLAIN, "header": "sentence x\t1"}, "has the columns sentence x, 1; wanted are `label`"),
    "twice": ({"lines": PLAIN, "header": "label\tlabel"}, "train.tsv: the header names the column 'label' twice."),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_file_that_cannot_be_read_is_refused_by_line(tmp_path, case):
    written, message = BAD_LINES[case]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        glue.load(write_bytes(tmp_path, **written))
    assert "\n" not in str(caught.value)


def test_the_validation_file_is_looked_at_too(tmp_path):
    folder = write_bytes(tmp_path, PLAIN)
    (tmp_path / "validation.tsv").write_text("text\tlabel\na\t0\n")
    with pytest.raises(InputError, match="validation.tsv: the column 'sentence' is missing; there are text, label."):
        glue.load(folder)


@pytest.mark.parametrize("name", ["mrpc", "sst2", "wnli", "qqp"])
def test_real_glue(name, real_data):
    task = glue.load(str(real_data / "glue" / name), n_train=300, n_validation=50)
    assert task.columns == glue.TASKS[name]
    assert task.flipped.sum() == 60 and len(task.train) == 300
