"""Influence scores of a LoRA classifier by us, the published way and other libraries: ``benchmarks/README.md``.

python -m benchmarks.side_by_side                                  # up to half an hour on 2 cores
python -m benchmarks.side_by_side --n 48 --m 8 --repeats 1         # in small
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import datainf
from benchmarks import published
from benchmarks.common import (
    BATCH_SIZE,
    Stages,
    check_close,
    collate,
    matrix_product_rate,
    positive,
    random_roberta,
    random_texts,
    training_passes,
    write,
)
from benchmarks.peers import bergson_scores, dattri_llm_scores, dattri_scores, kronfluence_scores
from datainf import progress
from datainf.attribution.methods import datainf as datainf_method
from datainf.gradients.layers import trainable_layers
from datainf.models.losses import classification

DATTRI_LAM = 0.1  # dattri has one damping constant for all layers
FEW_TEXTS, FEW_QUERIES = 64, 2  # the published way is timed on this many, and its time scaled up
BATCH_SIZES = (8, BATCH_SIZE)  # each has the better one


@dataclass(frozen=True)
class Way:
    """One way to the scores of n training texts for m queries.

    Attributes:
        library, method: whose, and what it computes.
        run: ``run(train, queries, stages, batch_size)`` returns the scores (m, n), or None where there are none.
        note: what is fair to know about it.
        same_as: the method of ours whose scores these must be.
        scaled: whether it is run on few texts and queries, and its times scaled up.
    """

    library: str
    method: str
    run: Callable[[Sequence[dict], Sequence[dict], Stages, int], Tensor | None]
    note: str = ""
    same_as: str = ""
    scaled: bool = False

    @property
    def name(self) -> str:
        return f"{self.library} {self.method}"


def ours(model: nn.Module, method: str | Callable) -> Callable:
    """`per_sample_gradients` of both, `ihvp`, `scores`."""

    def run(train: Sequence[dict], queries: Sequence[dict], stages: Stages, batch_size: int) -> Tensor:
        with stages("gradients"):
            options = {"collate_fn": collate, "batch_size": batch_size}
            G = datainf.per_sample_gradients(model, train, classification, **options)
            V = datainf.per_sample_gradients(model, queries, classification, **options)
        with stages("ihvp"):
            R = datainf.ihvp(G, V, method)
        with stages("scores"):
            return datainf.scores(G, R)

    return run


def our_ekfac(model: nn.Module) -> Callable:
    """As `ours`, with another pass over the training examples for the factors."""

    def run(train: Sequence[dict], queries: Sequence[dict], stages: Stages, batch_size: int) -> Tensor:
        options = {"collate_fn": collate, "batch_size": batch_size}
        with stages("gradients"):
            G, V = (datainf.per_sample_gradients(model, part, classification, **options) for part in (train, queries))
        with stages("factors"):
            factors = datainf.kronecker_factors(model, train, classification, **options)
        with stages("ihvp"):
            R = datainf.ihvp(G, V, "ekfac", factors=factors)
        with stages("scores"):
            return datainf.scores(G, R)

    return run


def the_published_way(model: nn.Module, method: Callable) -> Callable:
    """Batch size 1, dicts of CPU tensors, Python loops."""

    def run(train: Sequence[dict], queries: Sequence[dict], stages: Stages, batch_size: int) -> Tensor:
        with stages("gradients"):
            G, V = (published.gradients(model, texts, collate) for texts in (train, queries))
        with stages("ihvp"):
            R = method(G, V)
        with stages("scores"):
            return published.scores(G, R)

    return run


def training_step(model: nn.Module) -> Callable:
    """Forward and backward of a training step over all texts, without an optimizer: what gradients cannot undercut."""

    def run(train: Sequence[dict], queries: Sequence[dict], stages: Stages, batch_size: int) -> None:
        with stages("forward and backward"):
            for texts in (train, queries):
                training_passes(model, texts, batch_size)

    return run


def ways(model: nn.Module, folder: str) -> list[Way]:
    """All that are compared. `folder` is where kronfluence, bergson and dattri-llm write."""

    def constant_lam(G, V, lam: float) -> Tensor:
        return datainf_method(G, V, DATTRI_LAM)

    def kronfluence(strategy: str) -> Callable:
        return lambda train, queries, stages, batch_size: kronfluence_scores(
            model, train, queries, collate, strategy, stages, folder, batch_size
        )

    def dattri(attributor: str, **options) -> Callable:
        return lambda train, queries, stages, batch_size: dattri_scores(
            model, train, queries, collate, attributor, stages, batch_size, regularization=DATTRI_LAM, **options
        )

    def bergson(index: bool) -> Callable:
        return lambda train, queries, stages, batch_size: bergson_scores(
            model, train, queries, collate, stages, folder, batch_size, index=index
        )

    def dattri_llm(attributor: str) -> Callable:
        return lambda train, queries, stages, batch_size: dattri_llm_scores(
            model, train, queries, collate, attributor, stages, folder, batch_size
        )

    return [
        Way("training step", "", training_step(model), "no scores: what gradients can hardly undercut"),
        Way("ours", "hessian_free", ours(model, "hessian_free")),
        Way("ours", "datainf", ours(model, "datainf")),
        Way("ours", "datainf, lam of dattri", ours(model, constant_lam), f"lam = {DATTRI_LAM} in every layer"),
        Way("ours", "exact", ours(model, "exact"), "the H that DataInf approximates, solved exactly"),
        Way("ours", "kronecker", ours(model, "kronecker"), "as ekfac, from the stored gradients alone"),
        Way("ours", "ekfac", our_ekfac(model), "the H of kronfluence's ekfac"),
        Way(
            "published way", "hessian_free", the_published_way(model, published.hessian_free), "", "hessian_free", True
        ),
        Way("published way", "datainf", the_published_way(model, published.datainf), "", "datainf", True),
        Way(
            "kronfluence",
            "identity",
            kronfluence("identity"),
            "the scores of hessian_free; keeps no gradients, so that further queries cost another pass",
            "hessian_free",
        ),
        Way(
            "kronfluence",
            "ekfac",
            kronfluence("ekfac"),
            "its default strategy, with the empirical Fisher, as ours",
            "ekfac",
        ),
        Way("dattri", "grad_dot", dattri("grad_dot"), "the scores of hessian_free", "hessian_free"),
        Way("dattri", "datainf", dattri("datainf"), "its parts called once each", "datainf, lam of dattri"),
        Way(
            "dattri",
            "datainf, attribute()",
            dattri("datainf", in_stages=False),
            "its usual call: queries' gradients and ihvp anew for every training batch, so less in larger ones",
            "datainf, lam of dattri",
        ),
        Way(
            "bergson",
            "score",
            bergson(index=False),
            "the scores of hessian_free, by its collectors around our loss; keeps no training gradients, so that "
            "further queries cost another pass",
            "hessian_free",
        ),
        Way(
            "bergson",
            "index",
            bergson(index=True),
            "the same from an index of the training gradients, written to disk in float32 and read again",
            "hessian_free",
        ),
        Way(
            "dattri-llm",
            "tracin",
            dattri_llm("tracin"),
            "the scores of hessian_free; keeps layers' inputs and output gradients, token by token",
            "hessian_free",
        ),
        Way(
            "dattri-llm",
            "ekfac",
            dattri_llm("ekfac"),
            "the H of ours, its eigenvectors in float32: scores differ from ours by about 1 %, and are not checked",
        ),
    ]


def better_batch_size(way: Way, train: Sequence[dict], queries: Sequence[dict]) -> int:
    """The one of `BATCH_SIZES` that takes less time on a part of the texts, each tried once after a warm-up."""
    totals = {}
    for batch_size in (BATCH_SIZES[0], *BATCH_SIZES):
        stages = Stages()
        way.run(train, queries, stages, batch_size)
        totals[batch_size] = sum(stages.taken.values())
    return min(totals, key=totals.get)


def check_scores(all_ways: Sequence[Way], train: Sequence[dict], queries: Sequence[dict]) -> None:
    """Refuse to compare the speed of ways whose scores differ where they should not."""
    found = {way.name: way.run(train, queries, Stages(), BATCH_SIZE) for way in all_ways}
    for way in all_ways:
        if way.same_as:
            check_close(way.name, found[way.name], found[f"ours {way.same_as}"])


def operations(stage: str, method: str, n: int, m: int, D: int) -> float:
    """Floating-point operations of the matrix products of a stage of DataInf or Hessian-free, all layers together."""
    products = {"ihvp": 2 if method.startswith("datainf") else 0, "scores": 1}
    return 2 * products.get(stage, 0) * m * n * D


def measure(n: int, m: int, repeats: int) -> pd.DataFrame:
    """A row for each stage of each way, and one for all its stages together."""
    model, train, queries = random_roberta(), random_texts(n), random_texts(m)
    D = sum(weight.numel() for weight in trainable_layers(model).values())
    few = train[: min(n, FEW_TEXTS)], queries[: min(m, FEW_QUERIES)]
    with tempfile.TemporaryDirectory() as folder, progress.off():
        all_ways = ways(model, folder)
        print("comparing the scores ...", flush=True)
        check_scores(all_ways, *few)
        part = few[0], queries[: min(m, 16)]
        sizes = {way: better_batch_size(way, *part) for way in all_ways if not way.scaled}
        taken = {way: {"seconds": [], "bytes": {}} for way in all_ways}
        rates = []
        for kind in ["bytes", *["seconds"] * repeats]:
            rates.append(matrix_product_rate())
            for way in tqdm(all_ways, desc=kind, leave=False):
                stages = Stages(count_bytes=kind == "bytes")
                way.run(*(few if way.scaled else (train, queries)), stages, sizes.get(way, 1))
                if kind == "bytes":
                    taken[way]["bytes"] = stages.taken
                else:
                    taken[way]["seconds"].append(_scaled(stages.taken, way, few, n, m))
    scaled_from = f"times scaled up from {len(few[0])} texts and {len(few[1])} queries"
    rows = [row for way in all_ways for row in _rows(way, taken[way], sizes.get(way, 1), n, m, scaled_from)]
    record = pd.DataFrame(rows)
    # Of those whose stages are these products and nothing else.
    of_products = [
        operations(row.stage, row.method, n, m, D) if row.library in ("ours", "published way") else 0
        for row in record.itertuples()
    ]
    record["share_of_rate"] = [
        count / seconds / max(rates) if count else float("nan")
        for count, seconds in zip(of_products, record["seconds_median"], strict=True)
    ]
    limit = record.query("library == 'training step' and stage == 'total'")["seconds_median"].item()
    return record.assign(ratio_to_training_step=record["seconds_median"] / limit, n=n, m=m, D=D)


def _scaled(seconds: dict[str, float], way: Way, few: tuple[Sequence, Sequence], n: int, m: int) -> dict[str, float]:
    """The seconds for n and m, where the way was run on fewer: gradients by texts, the loops by pairs."""
    if not way.scaled:
        return seconds
    texts, pairs = (n + m) / (len(few[0]) + len(few[1])), n * m / (len(few[0]) * len(few[1]))
    return {stage: value * (texts if stage == "gradients" else pairs) for stage, value in seconds.items()}


def _rows(way: Way, taken: dict, batch_size: int, n: int, m: int, scaled_from: str) -> list[dict]:
    """The stages of a way and their total, whose peak is the largest of a stage."""
    seconds = [{**stages, "total": sum(stages.values())} for stages in taken["seconds"]]
    peaks = {**taken["bytes"], "total": max(taken["bytes"].values())}
    return [
        {
            "library": way.library,
            "method": way.method,
            "stage": stage,
            "seconds_median": median(round_[stage] for round_ in seconds),
            "seconds_min": min(round_[stage] for round_ in seconds),
            "examples_per_second": (n + m) / median(round_[stage] for round_ in seconds),
            "peak_bytes": float("nan") if way.scaled else peaks[stage],
            "batch_size": batch_size,
            "repeats": len(seconds),
            "note": "; ".join(filter(None, [way.note, scaled_from if way.scaled else ""])),
        }
        for stage in seconds[0]
    ]


def main() -> None:
    """Measure, print the totals and write the record."""
    parser = argparse.ArgumentParser(description="Influence scores by several libraries, side by side.")
    parser.add_argument("--n", type=positive, default=256, help="training texts (256)")
    parser.add_argument("--m", type=positive, default=64, help="queries (64)")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds, in which all take turns (3)")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/side_by_side.csv"), help="the record")
    options = parser.parse_args()
    torch.manual_seed(0)
    record = measure(options.n, options.m, options.repeats)
    columns = ["library", "method", "stage", "seconds_median", "ratio_to_training_step", "share_of_rate"]
    print(record[columns].to_string(index=False, float_format="{:.3f}".format))
    write(record, options.output)


if __name__ == "__main__":
    main()
