"""Whether a model that is trained again without the suspects is better."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from datainf.data import own
from datainf.errors import InputError
from datainf.evaluation import retraining, selection
from datainf.evaluation.paired import confidence_interval
from datainf.evaluation.retraining import Bank
from datainf.study.ground_truth import Subject


def retrained(chosen: Subject, judged: Dataset, suspects: Sequence[int], seeds: int, folder: Path) -> Bank:
    """Fine-tune on all examples, without the suspects, and without as many at random, each with several orders of
    batches, and measure examples that no score has seen.

    Raises:
        InputError: there is no recipe.
    """
    if chosen.tuned.training is None:
        raise InputError("To train again, the adapter's recipe must be known: give epochs and learning_rate.")
    n, share, plan = len(chosen.tuned.train), 1 - len(suspects) / len(chosen.tuned.train), []
    harm = np.isin(np.arange(n), suspects).astype(float)
    for order in range(seeds):
        chance = np.random.default_rng(order).standard_normal(n)
        each = [
            retraining.full(n),
            selection.keep(harm, share, "suspects"),
            selection.keep(chance, share, "random"),
        ]
        plan += [replace(one, order=order) for one in each]
    outcome_of = retraining.outcomes(replace(chosen.tuned, query=judged), chosen.loss_fn, chosen.right_fn, batch_size=8)
    about = {"task": chosen.task.name, "data": chosen.task.revision, "judged_on": own.revision_of(judged)}
    about["recipe"] = asdict(chosen.tuned.training.recipe)
    return retraining.bank(plan, outcome_of, about, folder)


def whether_it_helped(bank: Bank) -> pd.DataFrame:
    """The loss and the share of right answers of the models that `retrained` made, mean over orders of batches, and by
    how much they are better than those of all data, paired by order, with a 95% interval (Student's t)."""
    rows = {}
    orders = sorted(bank.rows["order"].unique())
    full = {order: bank.select(design="full", order=order) for order in orders}
    for name, values in {
        "all data": {"design": "full"},
        "suspects": {"method": "suspects"},
        "random": {"method": "random"},
    }.items():
        some = [bank.select(order=order, **values) for order in orders]
        found = {"loss": np.mean([each.losses.mean() for each in some])}
        gains = {
            "loss_gain": [
                full[order].losses.mean() - each.losses.mean() for order, each in zip(orders, some, strict=True)
            ]
        }
        if bank.right is not None:
            found["right"] = np.mean([each.right.mean() for each in some])
            gains["right_gain"] = [
                each.right.mean() - full[order].right.mean() for order, each in zip(orders, some, strict=True)
            ]
        for gain, each in gains.items():
            low, high = confidence_interval(pd.Series(each))
            found |= {gain: np.mean(each), f"{gain}_low": low, f"{gain}_high": high}
        rows["without " + name if name != "all data" else name] = found
    return pd.DataFrame(rows).T


def readable(helped: pd.DataFrame) -> pd.DataFrame:
    """`whether_it_helped` with each gain and its interval in one cell."""

    def gain(row: pd.Series, name: str) -> str:
        value, low, high = row[[name, f"{name}_low", f"{name}_high"]]
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"

    table = pd.DataFrame({"loss, nats": helped["loss"].map("{:.3f}".format)})
    table["lower than of all data by"] = helped.apply(gain, axis=1, name="loss_gain")
    if "right" in helped:
        table["right answers"] = helped["right"].map("{:.1%}".format)
        table["more than of all data by"] = helped.apply(gain, axis=1, name="right_gain")
    table.iloc[0, 1::2] = ""
    return table
