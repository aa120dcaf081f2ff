"""Binary GLUE tasks with label noise (paper sections 4.1 and 4.2, D.1)."""

import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from datasets import Dataset
from pandas.io.formats.style import Styler

from datainf.data import built_in, revision_of
from datainf.data.tables import table
from datainf.errors import InputError

HUB_DATASET = "nyu-mll/glue"
TASKS = {
    "mrpc": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "wnli": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "cola": ("sentence",),
    "rte": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
}
# The paper draws 4,500 training and 500 validation examples from the two large tasks (D.1).
PAPER_SIZES = {"sst2": (4500, 500), "qqp": (4500, 500)}
# Rows that a built-in task has for training and for validation: what GLUE's files are to the others.
DEMO_POOL = (2000, 500)


@dataclass(frozen=True)
class NoisyTask:
    """A classification task of which some training labels are wrong, on purpose and on record.

    Attributes:
        name: the task's short name.
        columns: its one or two text columns.
        train, validation: datasets with those columns and ``label``; training labels as the model sees them.
        flipped: bool array (n,), True where a training label was flipped. For evaluation only, hence kept
            apart from the columns that fine-tuning and gradients are given.
        revision: which data: a hash of all rows that the subsample was drawn from.
    """

    name: str
    columns: tuple[str, ...]
    train: Dataset
    validation: Dataset
    flipped: np.ndarray
    revision: str

    @property
    def majority(self) -> float:
        """The validation accuracy of always answering the most frequent validation label."""
        return max(np.bincount(self.validation["label"])) / len(self.validation)

    def examples(self, *, clean: int, mislabeled: int) -> Styler:
        """The first so many clean and mislabeled training examples, to be read."""
        rows = self.train.to_pandas().assign(mislabeled=self.flipped)
        first = pd.concat([rows[~self.flipped][:clean], rows[self.flipped][:mislabeled]])
        return first.style.set_properties(**{"text-align": "left"})


def load(
    dataset: str,
    *,
    n_train: int | None = None,
    n_validation: int | None = None,
    noise: float = 0.2,
    seed: int = 0,
) -> NoisyTask:
    """Load a task, draw a subsample and flip a share of the training labels, all by `seed`.

    Args:
        dataset: a GLUE task of the hub (a key of `TASKS`), a folder with ``train.tsv`` and ``validation.tsv`` in
            the hub's column names (tab-separated, header, no quoting), or a built-in task (a key of `built_in.TASKS`).
        n_train, n_validation: at most this many examples; by default the paper's sizes, or all there are.
        noise: the share of training labels to flip, 0 <= noise < 1.

    Raises:
        InputError: no such dataset, a file or column missing, a file that is no text or a row that does not fit
            (names its line), labels other than 0 and 1, labels of one class only, sizes or noise out of range.
    """
    if not 0 <= noise < 1:
        raise InputError(f"noise must be a share from 0 up to 1, not {noise}.")
    for name, size in (("n_train", n_train), ("n_validation", n_validation)):
        if size is not None and size < 2:
            raise InputError(f"{name} must be at least 2, not {size}.")

    dataset = os.path.expanduser(dataset)
    name = Path(dataset).name
    sizes = PAPER_SIZES.get(name, (None, None))
    n_train, n_validation = n_train or sizes[0], n_validation or sizes[1]
    train, validation, columns = _read(dataset)
    revision = revision_of(train, validation)

    rng = np.random.default_rng(seed)
    train = _draw(_checked(train, columns, f"{dataset}, training"), n_train, rng)
    validation = _draw(_checked(validation, columns, f"{dataset}, validation"), n_validation, rng)

    flipped = np.zeros(len(train), dtype=bool)
    flipped[rng.choice(len(train), size=round(noise * len(train)), replace=False)] = True
    noisy = np.where(flipped, 1 - np.array(train["label"]), train["label"])
    train = train.remove_columns("label").add_column("label", noisy.tolist())
    return NoisyTask(name, columns, train, validation, flipped, revision)


def _read(dataset: str) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """(train, validation, text columns) of a built-in task, a folder or a task of the hub."""
    if dataset in built_in.TASKS:
        # One draw, cut in two, so that no validation sentence was trained on.
        pool = Dataset.from_pandas(built_in.generate(dataset, sum(DEMO_POOL), seed=0), preserve_index=False)
        return (
            pool.select(range(DEMO_POOL[0])),
            pool.select(range(DEMO_POOL[0], len(pool))),
            built_in.TASKS[dataset],
        )
    if Path(dataset).is_dir():
        files = [Path(dataset) / f"{split}.tsv" for split in ("train", "validation")]
        for path in files:
            if not path.is_file():
                raise InputError(f"The dataset's folder {dataset} holds no {path.name}.")
        rows = [table(path, "\t", quoted=False) for path in files]
        columns = _columns_of(dataset, list(rows[0]))
        return *(_with_numbers(*each, columns) for each in zip(rows, files, strict=True)), columns
    if dataset in TASKS:
        try:
            splits = datasets.load_dataset(HUB_DATASET, dataset)
        except Exception as error:  # offline, hub down, no access: the same to the user
            raise InputError(
                f"GLUE task {dataset!r} could not be loaded from the hub ({type(error).__name__}): "
                "go online, or give a folder with train.tsv and validation.tsv."
            ) from error
        return splits["train"], splits["validation"], TASKS[dataset]
    raise InputError(
        f"There is no dataset {dataset!r}: give a folder with train.tsv and validation.tsv, a GLUE task "
        f"({', '.join(TASKS)}) or a built-in task ({', '.join(built_in.TASKS)})."
    )


def _columns_of(dataset: str, names: list[str]) -> tuple[str, ...]:
    """The text columns of a folder's task, known by the hub's column names."""
    for columns in sorted(set(TASKS.values()), key=len, reverse=True):
        if set(columns) <= set(names):
            return columns
    raise InputError(
        f"{dataset} has the columns {', '.join(names)}; wanted are `label` and the hub's text columns, "
        f"one of: {'; '.join(' and '.join(columns) for columns in sorted(set(TASKS.values())))}."
    )


def _with_numbers(rows: pd.DataFrame, path: Path, columns: tuple[str, ...]) -> Dataset:
    """The rows of a file with their labels as numbers, once it is known that each row has a label and some text."""
    for column in (*columns, "label"):
        if column not in rows:
            raise InputError(f"{path}: the column {column!r} is missing; there are {', '.join(rows)}.")
    labels = pd.to_numeric(rows["label"], errors="coerce")
    if (wrong := ~labels.isin([0, 1])).any():
        line = wrong.idxmax()
        raise InputError(f"{path}, line {line}: labels must be 0 and 1, but this one is {rows['label'][line]!r}.")
    # One of two may be empty, as it is in some rows of QQP.
    if (empty := rows[list(columns)].apply(lambda texts: texts.str.strip() == "").all(axis=1)).any():
        raise InputError(f"{path}, line {empty.idxmax()}: the {columns[0]} is empty; write one or leave the row out.")
    return Dataset.from_pandas(rows.assign(label=labels.astype("int64")), preserve_index=False)


def _checked(split: Dataset, columns: tuple[str, ...], what: str) -> Dataset:
    """The split's text and label columns alone, once its labels are known to be of two classes, 0 and 1."""
    if missing := {*columns, "label"} - set(split.column_names):
        raise InputError(f"{what}: the column {sorted(missing)[0]!r} is missing.")
    labels = set(split.unique("label"))
    if not labels <= {0, 1}:
        raise InputError(f"{what}: labels must be 0 and 1, but there are {sorted(map(str, labels - {0, 1}))[:3]}.")
    if len(labels) < 2:
        raise InputError(f"{what}: all labels are of one class, so there is nothing to learn; two are needed.")
    return split.select_columns([*columns, "label"])


def _draw(split: Dataset, size: int | None, rng: np.random.Generator) -> Dataset:
    """At most `size` rows in random order (all where `size` is None)."""
    return split.select(rng.permutation(len(split))[:size])
