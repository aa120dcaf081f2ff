"""An adapter of your own, audited: what notebook 80 does, step by step.

Rank the training examples by what they do to some answers, look, leave the suspects out, and see whether it helped.
"""

from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import pandas as pd
import psutil
from datasets import Dataset

from datainf.attribution.estimating import Estimate
from datainf.data import own
from datainf.errors import InputError
from datainf.models import own as own_models
from datainf.storage.memory import in_words
from datainf.study.audit.again import readable, retrained, whether_it_helped
from datainf.study.audit.fit import SAMPLE, best_read, fitted, fitted_by_label, learned, readable_fit, warning_of
from datainf.study.audit.ranking import SHOWN, chosen_by_hand, first, ranked, suspicious, write
from datainf.study.ground_truth import Subject
from datainf.study.plotting import label

__all__ = [
    "SAMPLE",
    "SHOWN",
    "best_read",
    "check_room",
    "chosen_by_hand",
    "first",
    "fitted",
    "fitted_by_label",
    "halved",
    "learned",
    "ranked",
    "readable",
    "readable_fit",
    "retrained",
    "subject",
    "summary",
    "suspicious",
    "title_of",
    "warning_of",
    "whether_it_helped",
    "write",
]

TEMPLATE_NAMES = {
    **dict.fromkeys(("auto", "chat"), "the tokenizer's chat template"),
    "plain": "writing prompt and response one after the other",
    "space": "writing prompt and response with a space between",
}


@dataclass(frozen=True)
class OwnTask:
    """What a record says of examples of one's own."""

    name: str
    revision: str


def subject(adapter: own_models.Adapter, train: Dataset, query: Dataset, name: str) -> Subject:
    """An adapter and its examples, as the gradients, methods and baselines of the study take them."""
    columns = adapter.reading.text_columns
    texts = tuple([own.as_text(row, columns) for row in each] for each in (train, query))
    task = OwnTask(name, own.revision_of(train, query))
    return Subject(task, adapter.tuned, adapter.loss_fn, adapter.right_fn, texts, adapter.is_classifier)


def halved(chosen: Subject) -> tuple[Subject, Dataset]:
    """The subject with every other query, and those between, which no score has seen: a file is often in the order of
    its kinds."""
    every_other, between = (chosen.tuned.query.select(range(start, len(chosen.tuned.query), 2)) for start in (0, 1))
    texts = (chosen.texts[0], chosen.texts[1][::2])
    return replace(chosen, tuned=replace(chosen.tuned, query=every_other), texts=texts), between


def title_of(adapter: str) -> str:
    """The last two parts of the folder, since the last is often but "adapter"."""
    return "/".join(Path(adapter).absolute().parts[-2:])


def summary(
    adapter: own_models.Adapter,
    chosen: Subject,
    found: pd.DataFrame,
    answers: pd.DataFrame,
    in_sample: pd.DataFrame,
    method: str,
    suspects: str,
) -> str:
    """What a report says it is of, in HTML; `found` is what `learned` gave, `answers` the queries as `fitted`,
    `in_sample` some training examples likewise, and `suspects` says which they are."""
    tuned, kind = chosen.tuned, "classifier" if chosen.labelled else "language model"
    base = Path(getattr(tuned.model.get_base_model(), "name_or_path", "") or "its base").name  # no one's disk
    facts = {
        "model": f"a {kind} on {base}",
        "training examples": f"{len(tuned.train)}, of mean loss {found['loss'].iloc[0]:.3f} nats (without the adapter "
        f"{found['base_loss'].iloc[0]:.3f}: {'not learned' if warning_of(found) else 'learned'}) in a sample, in which "
        f"{in_sample['right'].sum()} of {len(in_sample)} are answered as in the file",
        "queries": f"{len(answers)}, of mean loss {answers['loss'].mean():.3f} nats; {answers['right'].sum()} are "
        "answered as they should be",
        "read": "as columns of text" if chosen.labelled else f"by {TEMPLATE_NAMES[adapter.reading.template]}",
        "ranked by": label(method),
        "suspects": f"{suspects}, in suspects.jsonl",
        "numbers": "examples and queries are counted from 0, in the order of their files",
    }
    rows = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in facts.items())
    return f'<table class="said facts-of">{rows}</table>'


def check_room(estimated: Estimate) -> None:
    """Refuse what memory does not hold, before long work starts.

    Raises:
        InputError: names the stage that needs most.
    """
    most, free = estimated.stages["peak_bytes"].astype(float), psutil.virtual_memory().available
    if most.max() > free:
        raise InputError(
            f"The stage {most.idxmax()!r} would hold {in_words(most.max())}, and {in_words(free)} of memory is free: "
            "give fewer queries, or fewer training examples."
        )
