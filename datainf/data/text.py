"""Text generation tasks of ten classes: sentence transformations and math word problems (paper section 4.3, D.2.1)."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pandas as pd
from datasets import Dataset

from datainf.data import revision_of
from datainf.data.built_in import math_problems, transformations
from datainf.data.tables import json_lines, table
from datainf.errors import InputError

COLUMNS = ("prompt", "response", "reason", "class")
PER_CLASS = 100  # examples of each class of a built-in task, as in the paper

Draw = Callable[[str, random.Random], dict[str, str]]

# Task -> the names of its classes and the function that draws one example of a class.
TASKS: dict[str, tuple[tuple[str, ...], Draw]] = {
    "sentence_transformations": (tuple(transformations.TRANSFORMATIONS), transformations.draw),
    "math_without_reasoning": (tuple(math_problems.PROBLEMS), partial(math_problems.draw, reasoning=False)),
    "math_with_reasoning": (tuple(math_problems.PROBLEMS), partial(math_problems.draw, reasoning=True)),
}


@dataclass(frozen=True)
class TextTask:
    """A text generation task of several classes.

    Attributes:
        name: the task's short name.
        classes: the names of its classes, in the order in which figures show them.
        train, test: datasets with the columns prompt, response, reason (empty where there is none) and class.
        revision: which data: a hash of all rows that these were drawn from.
    """

    name: str
    classes: tuple[str, ...]
    train: Dataset
    test: Dataset
    revision: str

    @property
    def n_train_per_class(self) -> float:
        """Training examples of each class, on average."""
        return len(self.train) / len(self.classes)


def load(task: str, *, n_train: int = 90, n_test: int = 10, seed: int = 0) -> TextTask:
    """Load a task and draw its training and test examples by `seed`.

    Args:
        task: a built-in task (a key of `TASKS`), or a dataset with the splits train and test in a folder
            (``train.jsonl`` and ``test.jsonl``, or .csv or .tsv; others as `datasets` reads them) or on the hub, with
            the columns prompt, response, class and, where the responses give one, reason.
        n_train, n_test: at most this many examples of each class.

    Raises:
        InputError: no such task, a split or a column missing, a file that is no text or a row that does not fit (names
            its line), an empty prompt, response or class, fewer than two classes, sizes out of range.
    """
    for name, size in (("n_train", n_train), ("n_test", n_test)):
        if size < 1:
            raise InputError(f"{name} must be at least 1 example of each class, not {size}.")
    if task in TASKS:
        rows = generate(task, seed)
        if n_train + n_test > PER_CLASS:
            raise InputError(
                f"{task} has {PER_CLASS} examples of each class: n_train + n_test must not exceed that, "
                f"but it is {n_train} + {n_test}."
            )
        classes, revision = TASKS[task][0], revision_of(Dataset.from_pandas(rows, preserve_index=False))
        # The rows come in random order: of each class the first ones train, the next ones test.
        place = rows.groupby("class").cumcount()
        train, test = rows[place < n_train], rows[(place >= n_train) & (place < n_train + n_test)]
    else:
        train, test = (_checked(split, name) for name, split in _read(os.path.expanduser(task)).items())
        classes = tuple(dict.fromkeys(train["class"]))
        if len(classes) < 2:
            raise InputError(f"{task}: all training examples are of one class; class detection needs two at least.")
        if lone := sorted(set(test["class"]) ^ set(classes)):
            raise InputError(f"{task}: the class {lone[0]!r} must have examples in both splits, train and test.")
        revision = revision_of(*(Dataset.from_pandas(split, preserve_index=False) for split in (train, test)))
        train, test = _draw(train, n_train, seed), _draw(test, n_test, seed)
    splits = (Dataset.from_pandas(split, preserve_index=False) for split in (train, test))
    return TextTask(Path(task).name, classes, *splits, revision)


def generate(task: str, seed: int) -> pd.DataFrame:
    """`PER_CLASS` unique examples of every class of a built-in task, in random order."""
    classes, draw = TASKS[task]
    rng = random.Random(f"text {seed}")  # not of the task: both math tasks ask the same questions
    rows: dict[str, dict[str, str]] = {}
    for name in classes:
        wanted = len(rows) + PER_CLASS
        while len(rows) < wanted:
            example = draw(name, rng)
            rows.setdefault(example["prompt"], {**example, "class": name})
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return pd.DataFrame(shuffled, columns=list(COLUMNS))


def final_answer(response: str) -> str:
    """What a response is judged by: what follows its last "Answer:", or all of it where it gives no reason."""
    return response.rpartition("Answer:")[2].strip()


def same_answer(response: str, true_response: str) -> bool:
    """Whether a generated response ends in the right answer."""
    return final_answer(response) == final_answer(true_response)


def _read(task: str) -> dict[str, pd.DataFrame]:
    """What messages call each split -> its rows, of the splits train and test of a dataset in a folder or on the hub.
    The rows of a file are numbered by its lines."""
    if task.startswith((".", os.sep, "~")) and not Path(task).is_dir():
        raise InputError(
            f"There is no folder {task}: give a folder with train.jsonl and test.jsonl, a dataset of the hub, or a "
            f"built-in task ({', '.join(TASKS)})."
        )
    for ending, read in READERS.items():
        files = [Path(task, f"{name}{ending}") for name in ("train", "test")]
        if all(path.is_file() for path in files):
            return {str(path): read(path).rename_axis("line") for path in files}
    try:
        splits = datasets.load_dataset(task)
    except Exception as error:  # offline, no such dataset, files it cannot read: the same to the user
        if Path(task).is_dir():
            raise InputError(
                f"The files in the folder {task} cannot be read as a dataset ({type(error).__name__}): "
                "give train.jsonl and test.jsonl in UTF-8."
            ) from error
        raise InputError(
            f"There is no task {task!r}, neither built in ({', '.join(TASKS)}) nor to be read from a folder or the "
            f"hub ({type(error).__name__})."
        ) from error
    for name in ("train", "test"):
        if name not in splits:
            raise InputError(f"{task} has no split {name!r}, only {', '.join(splits)}: train and test are needed.")
    return {f"{task}, {name}": splits[name].to_pandas().rename_axis("example") for name in ("train", "test")}


def _from_json(path: Path) -> pd.DataFrame:
    rows = json_lines(path)
    return pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)


# A file's ending -> what reads it.
READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".jsonl": _from_json,
    ".csv": partial(table, delimiter=",", quoted=True),
    ".tsv": partial(table, delimiter="\t", quoted=True),
}


def _checked(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """The rows of a split as text, once they are known to have all that is needed."""
    for column in ("prompt", "response", "class"):
        if column not in rows:
            raise InputError(f"{what}: the column {column!r} is missing; there are {', '.join(rows) or 'none'}.")
    numbered, rows = rows.index, pd.DataFrame({name: rows[name] if name in rows else "" for name in COLUMNS})
    for column in COLUMNS:
        no_text = rows[column].map(lambda value: not pd.api.types.is_scalar(value))
        if no_text.any():
            raise InputError(f"{what}: the {column} of {numbered.name} {no_text.idxmax()} is a list, but must be text.")
    rows = rows.fillna("").astype(str)
    for column in ("prompt", "response", "class"):
        if (empty := rows[column].str.strip() == "").any():
            raise InputError(f"{what}: the {column} of {numbered.name} {empty.idxmax()} is empty.")
    return rows.reset_index(drop=True)


def _draw(rows: pd.DataFrame, per_class: int, seed: int) -> pd.DataFrame:
    """At most so many rows of each class, in random order."""
    shuffled = rows.sample(frac=1, random_state=seed)
    return shuffled[shuffled.groupby("class").cumcount() < per_class]


def exchange_responses(test: Dataset, classes: Sequence[str]) -> Dataset:
    """Every prompt with the response of an example of the next class: does the influence follow one or the other?

    Column class is the prompt's, column response_class the response's.
    """
    rows = test.to_pandas()
    place = rows.groupby("class").cumcount()
    following = dict(zip(classes, [*classes[1:], classes[0]], strict=True))
    giver = [_in_turn(rows[rows["class"] == following[name]], k) for name, k in zip(rows["class"], place, strict=True)]
    exchanged = rows.assign(**{column: [row[column] for row in giver] for column in ("response", "reason")})
    exchanged["response_class"] = [row["class"] for row in giver]
    return Dataset.from_pandas(exchanged, preserve_index=False)


def with_preamble(split: Dataset, preamble: str) -> Dataset:
    """The same words before every prompt."""
    prompts = [f"{preamble} {prompt}" for prompt in split["prompt"]]
    return Dataset.from_pandas(split.to_pandas().assign(prompt=prompts), preserve_index=False)


def _in_turn(rows: pd.DataFrame, k: int) -> pd.Series:
    return rows.iloc[k % len(rows)]
