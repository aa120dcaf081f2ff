"""Which examples to train on: sets that a score chooses, and what a model fine-tuned on them is worth.

A score that is right about harm should say what to leave out, or whose label to change. Whether it does is tried on
queries that nothing else has seen: fine-tune on what a score leaves, and on what chance and the truth leave. The
retrainings are kept in a bank (`evaluation.retraining`), by the designs below.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Bool, Float

from datainf.errors import InputError
from datainf.evaluation import retraining
from datainf.evaluation.retraining import OWN, SAME, Bank, Outcome, Retraining
from datainf.models.lora import FineTuned

KEEP, RELABEL, GROUP = "keep", "relabel", "without_group"
"""Designs: trained without the worst; with the worst ones' labels changed; without one group."""

Harm = Float[np.ndarray, " n"]


def keep(harm: Harm, share: float, method: str) -> Retraining:
    """The least harmful share of the examples, by a method's scores for the mean query (> 0 harmful)."""
    return _chosen(harm, len(harm) - _count(share, len(harm)), KEEP, method)


def relabel(harm: Harm, share: float, method: str) -> Retraining:
    """All examples, the most harmful share of them with another label: those that are not `kept` as they are."""
    return _chosen(harm, _count(share, len(harm)), RELABEL, method)


def without_groups(groups: Sequence, *, batches: str = SAME) -> list[Retraining]:
    """Each group of examples left out whole: a source, a class, an author.

    Args:
        groups: of each example the group it is in.

    Raises:
        InputError: all are in one.
    """
    named = pd.unique(np.asarray(groups))
    if len(named) < 2:
        raise InputError(f"All examples are in one group, {str(named[0])!r}: nothing would be left without it.")
    return [
        Retraining(np.asarray(groups) != group, GROUP, place, str(group), batches) for place, group in enumerate(named)
    ]


def flip(examples: Dataset, chosen: Bool[np.ndarray, " n"]) -> Dataset:
    """The examples with the binary label of those chosen changed.

    Raises:
        InputError: there are more labels than two.
    """
    labels = np.asarray(examples["labels"])
    if not np.isin(labels, (0, 1)).all():
        raise InputError("Only a label of two can be changed to the other: there are more. Leave relabelling out.")
    flipped = np.where(chosen, 1 - labels, labels)
    return examples.remove_columns("labels").add_column("labels", flipped.tolist())


def still_wrong(chosen: Retraining, flipped: Bool[np.ndarray, " n"]) -> float:
    """The share of the labels trained on that are wrong after a choice, where those that were are known."""
    if chosen.design == RELABEL:
        return float((flipped ^ ~chosen.kept).mean())
    return float(flipped[chosen.kept].mean())


def outcomes(
    tuned: FineTuned, loss_fn: Callable, right_fn: Callable | None = None, *, batch_size: int = 32
) -> Callable[[Retraining], Outcome]:
    """`retraining.outcomes` that knows `RELABEL`, of a classifier with two labels.

    Args:
        tuned: its queries are those on which the outcome is measured.
    """
    plainly = retraining.outcomes(tuned, loss_fn, right_fn, batch_size=batch_size)

    def outcome_of(chosen: Retraining) -> Outcome:
        if chosen.design != RELABEL:
            return plainly(chosen)
        training = replace(tuned.training, examples=flip(tuned.training.examples, ~chosen.kept))
        relabelled = retraining.outcomes(replace(tuned, training=training), loss_fn, right_fn, batch_size=batch_size)
        return relabelled(retraining.full(len(chosen.kept), batches=chosen.batches))

    return outcome_of


def worth(bank: Bank, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """What each choice is worth beside all data, on the queries of the bank: a row per retraining.

    Columns design, method, number, share (of the examples left as they are), mean_loss (nats) and ``loss_gain``, by how
    much it is below that of the model of all data, with a 95% bootstrap interval over queries, loss_low and
    loss_high, both models' losses of a query drawn together; and of queries with an answer likewise accuracy,
    ``accuracy_gain``, accuracy_low and accuracy_high, in shares of right answers.

    Raises:
        InputError: the bank lacks the model of all data.
    """
    full = bank.select(design="full")
    if not len(full):
        raise InputError("The bank has no model that was fine-tuned on all examples: add retraining.full to its plan.")
    drawn = _drawn(bank.losses.shape[1], draws, seed)
    found = bank.rows[["design", "method", "number"]].assign(
        share=bank.kept.mean(axis=1), loss=bank.losses.mean(axis=1)
    )
    gains = {"loss": full.losses.mean(axis=0) - bank.losses}
    if bank.right is not None:
        found["accuracy"] = bank.right.mean(axis=1)
        gains["accuracy"] = bank.right.astype(float) - full.right.mean(axis=0)
    for name, gain in gains.items():
        low, high = np.quantile(gain @ drawn.T, [0.025, 0.975], axis=1)
        found[[f"{name}_gain", f"{name}_low", f"{name}_high"]] = np.stack([gain.mean(axis=1), low, high], axis=1)
    return found


def of_groups(scores: Float[np.ndarray, "m n"], groups: Sequence, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """What each group does to the mean query's loss, all its examples together: the sum of their scores.

    Columns group, examples, score, with a 95% bootstrap interval over queries, low and high, and
    ``change_without``, what the mean query's loss is predicted to change by, in nats, if the group is left out.
    """
    groups = np.asarray(groups)
    of_each = np.stack([scores[:, groups == group].sum(axis=1) for group in pd.unique(groups)])
    low, high = np.quantile(of_each @ _drawn(len(scores), draws, seed).T, [0.025, 0.975], axis=1)
    score = of_each.mean(axis=1)
    return pd.DataFrame(
        {
            "group": pd.unique(groups),
            "examples": [(groups == group).sum() for group in pd.unique(groups)],
            "score": score,
            "low": low,
            "high": high,
            "change_without": -score / scores.shape[1],
        }
    )


def _drawn(m: int, draws: int, seed: int) -> Float[np.ndarray, "draws m"]:
    """Weights of m queries that were drawn anew with replacement, so many times."""
    return np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=draws) / m


def _chosen(harm: Harm, worst: int, design: str, method: str) -> Retraining:
    """All but the most harmful so many; of equals the first stay."""
    kept = np.ones(len(harm), dtype=bool)
    kept[np.argsort(harm, kind="stable")[len(harm) - worst :]] = False
    return Retraining(kept, design, retraining.checksum(kept), method, OWN)


def _count(share: float, n: int) -> int:
    count = round(share * n)
    if not 0 < count <= n:
        raise InputError(f"A share of {share:g} of {n} examples is {count}: it must be some of them.")
    return count
