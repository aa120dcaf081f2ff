"""Examples of your own: a file, a folder or a dataset of the hub, of a text classifier or a language model.

A language model's examples are ``messages`` (a list of ``role`` and ``content``), or ``prompt`` and ``response`` (or
``completion``, as TRL calls it), each a text or a list of messages. A classifier's have a ``label``, and one or two
columns of text.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict

from datainf.errors import InputError

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
RESPONSES = ("response", "completion")
LABEL = "label"

Message = Mapping[str, str]


def load(source: str, split: str = "train") -> Dataset:
    """The examples in a file (JSONL, JSON, CSV, TSV or Parquet), in a folder that `datasets` has saved or reads, or in
    a dataset of the hub.

    Args:
        split: of a folder or of the hub; a file has one.

    Raises:
        InputError: there is nothing of that kind, it cannot be read, has no such split, or no examples.
    """
    path = Path(os.path.expanduser(source))
    try:
        if path.is_file():
            found = _read(path)
        elif path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        elif path.is_dir() or not _looks_like_a_path(source):
            found = datasets.load_dataset(str(path) if path.is_dir() else source)
        else:
            raise InputError(f"There is no file or folder {source}.")
    except InputError:
        raise
    except Exception as error:  # what datasets raises has no one type
        cause = str(error.__cause__ or error).strip().split("\n")[0][:200]
        raise InputError(f"{source} cannot be read as a dataset ({type(error).__name__}: {cause}).") from error
    if isinstance(found, DatasetDict | dict):
        if split not in found:
            raise InputError(f"{source} has no split {split!r}; it has {', '.join(found)}.")
        found = found[split]
    if not len(found):
        raise InputError(f"{source} has no examples.")
    return found


def _read(path: Path) -> Dataset:
    if path.suffix not in READERS:
        raise InputError(f"{path}: a file of examples ends in {', '.join(READERS)}.")
    # A text may well be "None" or "NA".
    options = {"keep_default_na": False} | ({"sep": "\t"} if path.suffix == ".tsv" else {})
    options = options if READERS[path.suffix] == "csv" else {}
    cache = {"keep_in_memory": True, "download_mode": "force_redownload"}  # the file may have changed since
    return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", **cache, **options)


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.endswith(tuple(READERS)) or source.count("/") > 1


def task_of(examples: Dataset, source: str) -> str:
    """What the columns say they are for: "CAUSAL_LM" or "SEQ_CLS", PEFT's names.

    Raises:
        InputError: neither.
    """
    columns = examples.column_names
    if "messages" in columns or ("prompt" in columns and any(name in columns for name in RESPONSES)):
        return "CAUSAL_LM"
    if LABEL in columns:
        return "SEQ_CLS"
    raise InputError(
        f"{source} has the columns {', '.join(columns)}: a language model needs messages, or prompt and response; a "
        "classifier needs label and a column of text."
    )


def conversation(row: Mapping, place: str) -> tuple[list[Message] | str, list[Message] | str]:
    """What comes before, and the response: both texts, or both lists of messages. Of ``messages`` all come after.

    Raises:
        InputError: something is missing or empty; `place` says where.
    """
    if row.get("messages") is not None:
        before, after = [], row["messages"]
    else:
        before, after = row.get("prompt"), next((row[name] for name in RESPONSES if row.get(name) is not None), "")
    before, after = (str(side) if isinstance(side, int | float) else side for side in (before, after))
    if before is None:
        raise InputError(f"{place}: the prompt is missing.")
    if isinstance(before, str) and isinstance(after, str):
        if not after.strip():
            raise InputError(f"{place}: the response is empty.")
        return before, after
    before, after = _turns(before, "user"), _turns(after, "assistant")
    if not all(isinstance(turn.get("content"), str) and turn.get("role") for turn in (*before, *after)):
        raise InputError(f"{place}: a message has a role and a content, both texts.")
    said = [turn["content"].strip() for turn in after if turn["role"] == "assistant"]
    if not said:
        raise InputError(f"{place}: no message is the assistant's, who responds.")
    if not all(said):
        raise InputError(f"{place}: the response is empty.")
    return before, after


def _turns(side: str | Sequence[Message], role: str) -> list[Message]:
    return [{"role": role, "content": side}] if isinstance(side, str) else list(side)


def text_columns(examples: Dataset, asked: Sequence[str], source: str) -> list[str]:
    """A classifier's one or two columns of text: those asked for, or the only one there is beside the label.

    Raises:
        InputError: one is missing, or it is not clear which they are.
    """
    if missing := [name for name in asked if name not in examples.column_names]:
        raise InputError(f"{source} has no column {missing[0]!r}; it has {', '.join(examples.column_names)}.")
    kinds = examples.features
    texts = list(asked) or [
        name
        for name in examples.column_names
        if name != LABEL and getattr(kinds[name], "dtype", "") in ("string", "large_string")
    ]
    if not 1 <= len(texts) <= (2 if asked else 1):
        said = f"{source} has {len(texts)} columns of text ({', '.join(texts)})"
        raise InputError(f"{said}: name the one or two that the model reads, text_columns=.")
    return texts


def as_text(row: Mapping, columns: Sequence[str] = ()) -> str:
    """All that a reader sees of an example: its columns of text, or who says what."""
    if columns:
        return "\n".join(str(row[name]) for name in columns)
    before, after = conversation(row, "an example")
    if isinstance(after, str):
        return f"{before}\n→ {after}"
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in [*before, *after])


def revision_of(*splits: Dataset) -> str:
    """A hash of all rows, however they are nested."""
    digest = hashlib.sha256()
    for split in splits:
        for row in split:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return f"sha256:{digest.hexdigest()[:12]}"
