"""Whether an adapter has learned its training examples, and how well each is fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from datasets import Dataset

from datainf.data import own
from datainf.errors import InputError
from datainf.models import own as own_models
from datainf.models.forward import of_each
from datainf.models.reading import TEMPLATES, Reading, encode, label_of
from datainf.study.ground_truth import Subject

SAMPLE = 64
"""Training examples on which it is seen whether the adapter has learned them."""

MUCH_LOWER = 0.8
"""Of two templates the one whose loss, over the base's, is below this part of the other's is the one trained on."""

IN_USE = "in use"
"""Of the templates that could write the examples the one that does."""


def best_read(
    adapter: str, train: Dataset, query: Dataset, reading: Reading, **options
) -> tuple[own_models.Adapter, pd.DataFrame]:
    """`models.own.load`; where ``template`` is "auto" and texts may be written in several ways, by the one that the
    adapter has learned best.

    Returns:
        The adapter, and what `learned` says of it.
    """
    loaded = own_models.load(adapter, train, query, reading=reading, **options)
    found = learned(loaded, train)
    if reading.template == "auto" and (best := found["over_base"].idxmin()) != IN_USE:
        loaded = loaded.read_by(best, train, query)
        found = learned(loaded, train)
    return loaded, found


def learned(adapter: own_models.Adapter, train: Dataset) -> pd.DataFrame:
    """Whether the adapter has learned its training examples as they are read here: the mean loss of a sample with it
    and without, a row per template that could write them, the one in use first.

    An adapter that is read by another template than it was trained by is not much better than its base, or better by
    that other.

    Raises:
        InputError: the losses are no numbers, as of a training that diverged.
    """
    sample, in_use, rows = train.select(range(min(SAMPLE, len(train)))), adapter.reading.template, {}
    texts_alone = not adapter.is_classifier and isinstance(own.conversation(sample[0], "Training example 0")[1], str)
    in_use = "plain" if in_use == "auto" and texts_alone else in_use
    others = [name for name in TEMPLATES if name not in (in_use, "auto")] if texts_alone else []
    for template in [in_use, *others]:
        if template == "chat" and not adapter.tuned.tokenizer.chat_template:
            continue
        encoded = adapter.tuned.train.select(range(len(sample)))
        if template != in_use:
            other = replace(adapter.reading, template=template)
            try:
                encoded = encode(sample, adapter.tuned.tokenizer, other)
            except InputError:  # by which these examples cannot be written
                continue
        with_it, without = adapter.losses_of(encoded)
        if not np.isfinite([with_it.mean(), without.mean()]).all():
            whose = "the adapter" if np.isfinite(without.mean()) else "its base"
            raise InputError(f"The training examples have no finite loss by {whose}: its weights are not to be used.")
        rows[IN_USE if template == in_use else template] = {"loss": with_it.mean(), "base_loss": without.mean()}
    table = pd.DataFrame(rows).T.rename_axis("template")
    return table.assign(over_base=table["loss"] / table["base_loss"])


def warning_of(found: pd.DataFrame) -> str:
    """What is amiss by `learned`, and what to do; empty where nothing is."""
    ours, best = found.iloc[0], found["over_base"].idxmin()
    rival = found.loc[best]
    better = best != IN_USE and rival["over_base"] < MUCH_LOWER * ours["over_base"]
    if ours["over_base"] < own_models.TUNED_IS_BELOW and not better:
        return ""
    said = f"With the adapter the mean training loss is {ours['loss']:.2f} nats, without it {ours['base_loss']:.2f}"
    if better:
        said += (
            f"; with the template {best} it is {rival['loss']:.2f}, and {rival['base_loss']:.2f} without. The adapter "
        )
        return (
            f"{said}was trained on that text: run again with AUDIT='{{template: {best}}}', and do not use these scores."
        )
    return (
        f"{said}: these are hardly the examples, or not the text, that the adapter was trained on. Do not use these "
        "scores before that is clear."
    )


def fitted(chosen: Subject, examples: Dataset) -> pd.DataFrame:
    """Each example's loss, in nats, and whether the model answers it rightly: a language model with every token."""
    take = {"collate": chosen.tuned.collate, "batch_size": 8}
    measured = {"loss": chosen.loss_fn, "right": chosen.right_fn}
    return pd.DataFrame({name: of_each(chosen.tuned.model, examples, each, **take) for name, each in measured.items()})


def fitted_by_label(sets: Mapping[str, tuple[pd.DataFrame, Sequence]]) -> pd.DataFrame:
    """How many examples of each label each set has, their mean loss in nats, and the share answered rightly.

    Args:
        sets: by what they are called, `fitted` and the examples' labels.
    """
    found = {}
    for name, (each, labels) in sets.items():
        by_label = each.groupby([label_of(label) for label in labels])
        found[name] = by_label.agg(n=("loss", "size"), loss=("loss", "mean"), right=("right", "mean"))
    return pd.concat(found, axis=1).sort_index().rename_axis(index="label")


def readable_fit(by_label: pd.DataFrame) -> pd.DataFrame:
    """`fitted_by_label` in words."""
    shown = {"n": ("n", "{:.0f}"), "loss": ("mean loss, nats", "{:.3f}"), "right": ("right", "{:.0%}")}
    columns = {(one, shown[name][0]): by_label[one, name].map(shown[name][1].format) for one, name in by_label}
    return pd.DataFrame(columns).replace("nan", "").replace("nan%", "")
