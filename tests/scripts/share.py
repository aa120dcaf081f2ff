"""Everything that processes share, once: what this process found, and what part of the work was its own.

Arguments: "work", "meet_damage" or "alone", and a folder for the stores and what was found.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import collate, make_examples, make_model
from tqdm.auto import tqdm

import datainf
from datainf import processes, progress
from datainf.models.losses import classification
from datainf.storage.store import GradientStore

METHODS = ("hessian_free", "datainf", "exact", "lissa_scaled", "kronecker", "ekfac")


def extraction(counts: list[int]) -> Callable[..., GradientStore]:
    """`per_sample_gradients` of 12 examples; `counts` is told of how many each batch was."""

    def loss(model, batch):
        counts.append(len(batch["labels"]))
        return classification(model, batch)

    model, examples = make_model(), make_examples(12)
    options = {"collate_fn": collate, "batch_size": 4, "shard_examples": 5}
    return lambda **given: datainf.per_sample_gradients(model, examples, loss, **options | given)


def work(folder: Path) -> None:
    rank, _ = processes.rank_and_count()
    found, parts, counts = {}, {}, []
    extract = extraction(counts)

    def count(what: str, **given) -> GradientStore:
        counts.clear()
        gradients = extract(**given)
        parts[what] = sum(counts)
        found[what] = dict(gradients)
        return gradients

    train = count("memory")
    count("bfloat16", dtype=torch.bfloat16)
    count("one batch", batch_size=12)  # and none for the second process
    on_disk = count("store", store=folder / "store")
    count("bfloat16 store", store=folder / "bfloat16", dtype=torch.bfloat16)
    if rank == 0:
        (folder / "store" / "shard-00001.safetensors").unlink()
    processes.wait()
    count("resumed", store=folder / "store")

    query = {name: G[-3:] for name, G in train.items()}
    name = next(iter(train))
    one, of_one = GradientStore({name: train[name]}, shapes=train.shapes), {name: query[name]}
    factors = datainf.kronecker_factors(
        make_model(), make_examples(12), classification, collate_fn=collate, batch_size=4
    )
    found["factors"] = torch.cat([side.flatten() for sides in factors.values() for side in sides])
    layers = set()
    for method in METHODS:
        found[method] = datainf.influence(train, query, method, factors=factors)
        found[f"{method} from disk"] = datainf.influence(on_disk, query, method, factors=factors, memory="1MB")
        R = datainf.ihvp(train, query, method, factors=factors)
        layers |= set(R)
        found[f"{method} in halves"] = datainf.scores(train, R)
        found[f"{method} of itself"] = datainf.self_influence(train, method, factors=factors)
        found[f"{method} of one layer"] = datainf.influence(one, of_one, method, factors=factors)
        found[f"{method} of one layer in halves"] = datainf.scores(
            one, datainf.ihvp(one, of_one, method, factors=factors)
        )
    parts["layers"] = sorted(layers)
    torch.save((found, parts), folder / f"found-{rank}.pt")


def meet_damage(folder: Path) -> None:
    print(f"{processes.rank_and_count()[1]} processes")
    extraction([])(store=folder / "store")


def alone(folder: Path) -> None:
    rank, _ = processes.rank_and_count()
    os.environ[processes.PATIENCE] = "2"  # only now: on a busy machine two processes start further apart than that
    if rank == 0:
        extraction([])()
    time.sleep(100)


class Eager(tqdm):
    """A bar that is shown at once and stays."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options | {"delay": 0, "leave": True})


if __name__ == "__main__":
    progress.tqdm, progress.LONG = Eager, 0
    {"work": work, "meet_damage": meet_damage, "alone": alone}[sys.argv[1]](Path(sys.argv[2]))
