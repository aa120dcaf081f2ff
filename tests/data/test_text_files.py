"""Text tasks in files that other programs wrote."""

import json
import re

import pytest

from datainf.data import text
from datainf.errors import InputError

ROWS = [{"prompt": f"{c} {i}?", "response": f"{i}", "class": c} for c in ("a", "b") for i in range(3)]


def write(folder, content: str, ending="jsonl", encoding="utf8"):
    for split in ("train", "test"):
        (folder / f"{split}.{ending}").write_bytes(content.encode(encoding))
    return str(folder)


def in_json(*more):
    return "\n".join([*(json.dumps(row, ensure_ascii=False) for row in ROWS), *more])


def separated(by, *more, end="\n"):
    return end.join([by.join(ROWS[0]), *(by.join(row.values()) for row in ROWS), *more, ""])


@pytest.mark.parametrize(
    ("content", "ending", "encoding"),
    [
        (in_json(), "jsonl", "utf-8-sig"),
        (in_json("", " "), "jsonl", "utf-16"),
        (separated(","), "csv", "utf-8-sig"),
        (separated(",", end="\r\n"), "csv", "utf-16"),
        (separated("\t"), "tsv", "utf8"),
    ],
)
def test_files_are_read_by_their_ending(tmp_path, content, ending, encoding):
    data = text.load(write(tmp_path, content, ending, encoding), n_train=3, n_test=1)
    keys = ("prompt", "response", "class")
    found = sorted(zip(*(data.train[key][:] for key in keys), strict=True))
    assert found == [tuple(row.values()) for row in ROWS]


def test_what_looks_like_a_number_or_like_nothing_is_text(tmp_path):
    data = text.load(write(tmp_path, separated(",", "what?,007,a", "who?,None,b", '"a, ""b""\nc",NA,a'), "csv"))
    answers = dict(zip(data.train["prompt"], data.train["response"], strict=True))
    assert [answers[prompt] for prompt in ("what?", "who?", 'a, "b"\nc')] == ["007", "None", "NA"]


def test_what_json_holds_besides_text_becomes_text(tmp_path):
    more = [{"prompt": "one\u2028line", "response": 7, "class": "a", "reason": None}]
    data = text.load(write(tmp_path, in_json(*(json.dumps(row, ensure_ascii=False) for row in more))))
    (row,) = [row for row in data.train if "one" in row["prompt"]]
    assert row == {"prompt": "one\u2028line", "response": "7", "reason": "", "class": "a"}


BAD_FILES = {
    "latin-1": ((in_json('{"prompt": "café"}'), "jsonl", "latin-1"), "train.jsonl, line 7 is not UTF-8 text: save"),
    "no json": ((in_json("{'prompt': 1}"),), "train.jsonl, line 7 is not JSON: write one object on each line"),
    "a list": ((in_json("", "[1]"),), "train.jsonl, line 8 is no JSON object: write one on each line"),
    "half a character": ((in_json(r'{"prompt": "\ud83d"}'),), "line 7 escapes a character that does not exist"),
    "no response": ((in_json('{"prompt": "p", "class": "a"}'),), "train.jsonl: the response of line 7 is empty."),
    "no class": ((in_json('{"prompt": "p", "response": "r", "class": null}'),), "the class of line 7 is empty."),
    "messages": ((in_json('{"prompt": [{"role": "user"}]}'),), "the prompt of line 7 is a list, but must be text."),
    "nothing": (("\n",), "train.jsonl is empty."),
    "a comma": ((separated(",", "p, q,r,a"), "csv"), "train.csv, line 8 has more fields than the header (4, not 3)."),
    "a quote": (
        (separated(",", '"p,r,a', "q,r,a"), "csv"),
        "line 8 cannot be read as a row: unexpected end",
    ),
    "a semicolon": ((separated(";"), "csv"), "the column 'prompt' is missing; there are prompt;response;class."),
    "a header": (("prompt,response,class\n", "csv"), "train.csv has a header but no examples."),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_does_not_fit_is_refused_by_line(tmp_path, case):
    written, message = BAD_FILES[case]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        text.load(write(tmp_path, *written))
    assert "\n" not in str(caught.value)


def test_other_files_that_cannot_be_read_are_not_called_missing(tmp_path):
    with pytest.raises(InputError, match="The files in the folder .* cannot be read as a dataset .*: give train.jsonl"):
        text.load(write(tmp_path, "no parquet", "parquet"))
