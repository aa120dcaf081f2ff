"""The rows of text files that others wrote, TSV, CSV and JSONL: what cannot be read is named by file and line."""

import codecs
import csv
import io
import json
import re
from pathlib import Path

import pandas as pd

from datainf.errors import InputError


def table(path: Path, delimiter: str, *, quoted: bool) -> pd.DataFrame:
    """The rows of a file with a header, every field as the text that it is; the index is the number of each row's line.

    Args:
        quoted: whether a field may stand in double quotes, as in CSV, which then mean no text.

    Raises:
        InputError: the file is no text (see `_text_of`), has no header, no rows, a column twice, or a row with more or
            fewer fields than columns.
    """
    # Lines end in "\n" and in nothing else: a line separator of Unicode is text.
    lines = io.StringIO(_text_of(path), newline="\n")
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows, end = {}, 0
    try:
        header = [name.strip() for name in next((row for row in reader if row), [])]
        if twice := [name for name in header if header.count(name) > 1]:
            raise InputError(f"{path}: the header names the column {twice[0]!r} twice.")
        end = reader.line_num
        for row in reader:
            line, end = end + 1, reader.line_num
            if row and len(row) != len(header):
                what = f"{'more' if len(row) > len(header) else 'fewer'} fields than the header"
                raise InputError(f"{path}, line {line} has {what} ({len(row)}, not {len(header)}).")
            if row:
                rows[line] = row
    except csv.Error as error:
        reason = "there is a carriage return within it" if "new-line" in str(error) else str(error)
        raise InputError(f"{path}, line {end + 1} cannot be read as a row: {reason}.") from error
    if not rows:
        raise InputError(f"{path} {'has a header but no examples' if header else 'is empty'}.")
    return pd.DataFrame(list(rows.values()), index=list(rows), columns=header, dtype=str)


def json_lines(path: Path) -> dict[int, dict]:
    """Line number -> the object on that line.

    Raises:
        InputError: the file is no text (see `_text_of`) or empty, or a line is no JSON object.
    """
    rows = {}
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            rows[number] = json.loads(line)
            json.dumps(rows[number], ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not JSON: write one object on each line ({error.msg}).") from error
        except UnicodeEncodeError as error:  # half of a pair of \u escapes
            raise InputError(f"{where} escapes a character that does not exist ({error.reason}).") from error
        if not isinstance(rows[number], dict):
            raise InputError(f'{where} is no JSON object: write one on each line, as {{"column": ...}}.')
    if not rows:
        raise InputError(f"{path} is empty.")
    return rows


def _text_of(path: Path) -> str:
    """A file's text, with "\\n" at the end of every line: UTF-8, or UTF-16 where a byte order mark says so.

    Raises:
        InputError: names the file and the line that is neither.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text, before = content.decode(encoding), None
    except UnicodeDecodeError as error:
        text, before = "", error.object[: error.start].decode(encoding, errors="ignore")
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        before = text[: text.index("\0")]
    if before is not None:
        line = before.count("\n") + 1
        raise InputError(f"{path}, line {line} is not UTF-8 text: save the file in that encoding.")
    text = re.sub("\r+\n", "\n", text)
    return text if "\n" in text else text.replace("\r", "\n")
