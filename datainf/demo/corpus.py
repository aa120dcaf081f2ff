"""The text the demo base is pre-trained on: phrases, reviews and sentence pairs, most with a spoken verdict.

The text comes from the same grammars as the demo tasks, but its reviews and pairs from the half of
the grammars' rows that no task ever shows (see `datainf.data.built_in.tasks.in_corpus`); and the random
streams are named after the corpus, not after a task, so equal seeds do not mean equal draws either.

A spoken verdict is one word in front of the text that says in English what the text amounts to:
"good" or "bad" before a review, "same" or "different" before a pair. Predicting that word makes the
base read the whole text. This is a pre-training skill, openly built in, which a large base has from
its large corpus; the classification head of a task still starts from scratch.
"""

import random
from dataclasses import dataclass

from datainf.data.built_in import paraphrases, reviews
from datainf.data.built_in.tasks import TASKS, draw_rows

# The words in front, by task: for label 0 and for label 1.
VERDICTS: dict[str, tuple[str, str]] = {
    "demo-reviews": ("bad", "good"),
    "demo-paraphrases": ("different", "same"),
}
# Comparing two sentences is the harder skill, so it gets most of the lines.
SHARE = {"demo-reviews": 0.25, "demo-paraphrases": 0.75}
# The other rows are plain text behind <s>, as RoBERTa's are.
SPOKEN_SHARE = 0.85
_PHRASE = {"demo-reviews": reviews.draw_phrase, "demo-paraphrases": paraphrases.draw_phrase}


@dataclass(frozen=True)
class Line:
    """One line of the corpus: one or two texts, and the verdict spoken in front of them, if any."""

    texts: tuple[str, ...]
    verdict: str | None


def phrases(n: int, seed: int) -> list[Line]:
    """Draw n lines of a phrase book: words and short phrases, each with its verdict."""
    rng = random.Random(f"corpus phrases {seed}")
    lines = []
    for _ in range(n):
        task = rng.choices(list(SHARE), list(SHARE.values()))[0]
        label = rng.getrandbits(1)
        lines.append(Line(_PHRASE[task](rng, bool(label)), VERDICTS[task][label]))
    return lines


def sentences(n: int, seed: int) -> list[Line]:
    """Draw n whole reviews and sentence pairs in random order, all unique, most with their verdict."""
    rng = random.Random(f"corpus sentences {seed}")
    lines = []
    for task, columns in TASKS.items():
        rows = draw_rows(task, round(n * SHARE[task]), f"corpus {task} {seed}", for_corpus=True)
        texts = rows[list(columns)].itertuples(index=False, name=None)
        for row, label in zip(texts, rows["label"], strict=True):
            spoken = rng.random() < SPOKEN_SHARE
            lines.append(Line(row, VERDICTS[task][label] if spoken else None))
    rng.shuffle(lines)
    return lines
