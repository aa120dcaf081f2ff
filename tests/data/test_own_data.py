"""Examples of one's own from every kind of file, and what is no such file."""

import json

import pytest
from datasets import Dataset, DatasetDict

from datainf.data import own
from datainf.errors import InputError

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": 'c, "d"', "response": "e\nf"}]


@pytest.fixture
def examples():
    return Dataset.from_list(ROWS)


@pytest.mark.parametrize("name", ["it.jsonl", "it.json", "it.csv", "it.parquet"])
def test_a_file_is_read_as_it_was_written(name, examples, tmp_path):
    path = tmp_path / "a folder" / name
    path.parent.mkdir()
    if name.endswith("json"):
        path.write_text(json.dumps(ROWS))
    else:
        {"l": examples.to_json, "v": examples.to_csv, "t": examples.to_parquet}[name[-1]](path)
    assert own.load(str(path)).to_list() == ROWS
    path.write_bytes(path.read_bytes().replace(b"a", b"z"))  # what changed since is seen
    if not name.endswith("parquet"):
        assert own.load(str(path))[0]["prompt"] == "z"


def test_a_folder_that_datasets_has_saved(examples, tmp_path):
    examples.save_to_disk(tmp_path / "one")
    DatasetDict({"train": examples, "test": examples.select([1])}).save_to_disk(tmp_path / "two")
    assert own.load(str(tmp_path / "one")).to_list() == own.load(str(tmp_path / "two")).to_list() == ROWS
    assert len(own.load(str(tmp_path / "two"), split="test")) == 1
    with pytest.raises(InputError, match="has no split 'dev'; it has train, test"):
        own.load(str(tmp_path / "two"), split="dev")


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        ({"messages": [[]]}, "CAUSAL_LM"),
        ({"prompt": ["x"], "completion": ["y"]}, "CAUSAL_LM"),
        ({"text": ["x"], "label": [1]}, "SEQ_CLS"),
    ],
)
def test_the_columns_say_what_they_are_for(columns, task):
    assert own.task_of(Dataset.from_dict(columns), "it") == task


def test_the_columns_of_text():
    table = Dataset.from_dict({"one": ["x"], "label": ["y"], "two": ["z"], "number": [1]})
    assert own.text_columns(table.remove_columns("one"), (), "it") == ["two"]
    with pytest.raises(InputError, match="it has 2 columns of text .one, two.: name the one or two"):
        own.text_columns(table, (), "it")  # one of which may be a name
    assert own.text_columns(table, ("two",), "it") == ["two"]
    with pytest.raises(InputError, match="it has no column 'three'; it has one, label, two, number"):
        own.text_columns(table, ("three",), "it")
    with pytest.raises(InputError, match="it has 0 columns of text"):
        own.text_columns(table.select_columns(["label", "number"]), (), "it")


def test_what_is_no_file_of_examples(tmp_path):
    (tmp_path / "it.txt").write_text("x")
    (tmp_path / "it.jsonl").write_text('{"prompt": "x"')
    (tmp_path / "none.jsonl").write_text("")
    for name, sentence in {
        "it.txt": "a file of examples ends in .jsonl, .json, .csv, .tsv, .parquet",
        "it.jsonl": "cannot be read as a dataset",
        "none.jsonl": "none.jsonl (has no examples|cannot be read)",
        "there.jsonl": "There is no file or folder",
    }.items():
        with pytest.raises(InputError, match=sentence):
            own.load(str(tmp_path / name))
    with pytest.raises(InputError, match="a language model needs messages, or prompt and response"):
        own.task_of(Dataset.from_dict({"text": ["x"]}), "it")


def test_a_revision_is_of_every_value(examples):
    other = Dataset.from_list([ROWS[0], {**ROWS[1], "response": "g"}])
    assert own.revision_of(examples) == own.revision_of(Dataset.from_list(ROWS)) != own.revision_of(other)


def test_a_text_may_be_none_or_a_number(tmp_path):
    (tmp_path / "it.csv").write_text("prompt,response\nWho?,None\nWhat?,NA\n")
    assert [own.conversation(row, "it")[1] for row in own.load(str(tmp_path / "it.csv"))] == ["None", "NA"]
    assert own.conversation({"prompt": "6 * 7", "response": 42}, "it") == ("6 * 7", "42")
