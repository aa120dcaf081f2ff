"""The demo tasks: two generated classification tasks with the columns of GLUE's.

`demo-reviews` is one sentence and its sentiment, like SST-2; `demo-paraphrases` is two sentences
and whether they say the same, like MRPC.

No row of a task is ever part of the text that the demo base is pre-trained on, whatever the seeds:
the checksum of its text assigns every row of the grammars either to the tasks or to the base's
corpus (`datainf.demo.corpus`). Rows of two calls with different seeds may coincide; take train and
validation rows from one call, whose rows are unique.
"""

import random
import zlib
from collections.abc import Callable

import pandas as pd

from datainf.data.built_in import paraphrases, reviews

TASKS: dict[str, tuple[str, ...]] = {
    "demo-reviews": ("sentence",),
    "demo-paraphrases": ("sentence1", "sentence2"),
}

# The grammars have far more rows; at this bound drawing unique ones is still quick.
MAX_ROWS = 50_000

_DRAW: dict[str, Callable[[random.Random, bool], tuple[str, ...]]] = {
    "demo-reviews": reviews.draw,
    "demo-paraphrases": paraphrases.draw,
}
_SHARE_OF_ONES = {"demo-reviews": 0.5, "demo-paraphrases": 0.55}


def generate(task: str, n: int, seed: int) -> pd.DataFrame:
    """Rows of a demo task, the same for the same arguments.

    Args:
        task: A key of `TASKS`.
        n: Number of rows, at least 1 and at most `MAX_ROWS`.
        seed: Seed of the drawing.

    Returns:
        A frame of n unique rows in random order with the text columns of the task (`TASKS[task]`)
        and `label`: for `demo-reviews` 0 negative, 1 positive (half of the rows each); for
        `demo-paraphrases` 0 another meaning, 1 the same meaning (55 % of the rows).

    Raises:
        ValueError: If the task is unknown or n is out of range.
    """
    if task not in TASKS:
        raise ValueError(f"unknown demo task {task!r}: choose one of {', '.join(TASKS)}")
    if not 1 <= n <= MAX_ROWS:
        raise ValueError(f"{task} gives between 1 and {MAX_ROWS} unique rows, not {n}")
    return draw_rows(task, n, f"task {task} {seed}", for_corpus=False)


def in_corpus(texts: tuple[str, ...]) -> bool:
    """Whether the row with these texts belongs to the base's corpus (half of all) and not to the tasks."""
    return zlib.crc32("\n".join(texts).encode()) % 2 == 0


def draw_rows(task: str, n: int, seed: str, *, for_corpus: bool) -> pd.DataFrame:
    """Draw n unique rows from the tasks' half of the grammar or from the corpus's half.

    Returns:
        A frame as `generate` gives it.
    """
    rng = random.Random(seed)
    ones = round(n * _SHARE_OF_ONES[task])
    labels = [1] * ones + [0] * (n - ones)
    rng.shuffle(labels)
    rows: dict[tuple[str, ...], int] = {}
    for label in labels:
        texts = _DRAW[task](rng, bool(label))
        while texts in rows or in_corpus(texts) != for_corpus:
            texts = _DRAW[task](rng, bool(label))
        rows[texts] = label
    frame = pd.DataFrame(list(rows), columns=list(TASKS[task]))
    frame["label"] = list(rows.values())
    return frame
