"""Is one method better than another? Differences in pairs, and what seeds say of them.

Two methods of one run share the model, the flips and the queries, so their difference is of one seed; what differs
between seeds falls out. Several datasets or ranks of one seed are no independent runs: a claim about an order of
methods is judged by the mean difference over all of them, of which each seed gives one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

HOLDS, FAILS, UNRESOLVED = "holds", "fails", "not resolved"
"""What the 95% interval of a difference says of a claim: all of it is on the claimed side, on the other, or neither."""
POWER = 0.8

FEW_SEEDS = 3
"""All cells are judged together, by the seeds that they share, if these are so many."""


def confidence_interval(values: pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of few runs; NaN where there is but one."""
    values = values.dropna()
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    return values.mean() - half, values.mean() + half


def differences(
    runs: pd.DataFrame, metric: str, one: str, other: str, *, cell: Sequence[str] = ("dataset", "rank")
) -> pd.Series:
    """A metric of one method minus that of another, by cell and seed; of runs that have both.

    Raises:
        KeyError: no run has one of them.
    """
    table = runs.pivot_table(metric, [*cell, "seed"], "method", sort=False)
    return (table[one] - table[other]).dropna()


@dataclass(frozen=True)
class Order:
    """What differences say of the claim that they are above `least`.

    Attributes:
        cells: by cell: mean, low, high (95% over seeds) and verdict.
        judged: how many of the cells the rest is of: all, if they share `FEW_SEEDS`, else those with the most seeds.
        mean, low, high: of the mean over those cells, over the seeds that they share.
        verdict: `HOLDS`, `FAILS` or `UNRESOLVED`, of that.
        detectable: the difference from `least` that would have been resolved with `POWER`, had it been there.
        seeds: how many these are.
        most_seeds: how many the cell with the most has.
    """

    cells: pd.DataFrame
    judged: int
    mean: float
    low: float
    high: float
    verdict: str
    detectable: float
    seeds: int
    most_seeds: int

    def __str__(self) -> str:
        said = f"in {(self.cells['mean'] > self.cells['least']).sum()} of {len(self.cells)} cells"
        if np.isnan(self.low):
            return f"{said}; mean {self.mean:.3f}, of one seed"
        held, failed = ((self.cells["verdict"] == verdict).sum() for verdict in (HOLDS, FAILS))
        some = f" over {self.judged} of them, which have {self.seeds} seeds"
        if self.judged == len(self.cells):
            some = f" over the {self.seeds} seeds of all" if self.most_seeds > self.seeds else ""
        mean = f"mean {self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{said} (resolved in {held}, against it in {failed}); {mean}{some}"


def order(differences: pd.Series, *, least: float = 0.0) -> Order:
    """Judge the claim that differences are above `least`.

    Args:
        differences: indexed by cell and, last, seed, as `differences` gives them.
    """
    by_cell = differences.groupby(level=differences.index.names[:-1], sort=False)
    limits = [confidence_interval(values) for _, values in by_cell]
    cells = by_cell.mean().to_frame("mean").assign(least=least)
    cells[["low", "high"]] = limits
    cells["verdict"] = [_verdict(low, high, least) for low, high in limits]
    of_runs = differences.unstack(list(range(differences.index.nlevels - 1)))
    most, judged = int(of_runs.count().max()), of_runs.dropna()
    if len(judged) < FEW_SEEDS:
        judged = of_runs.loc[:, of_runs.count() == most].dropna()
    of_seeds = judged.mean(axis=1)
    low, high = confidence_interval(of_seeds)
    freedom = len(of_seeds) - 1
    detectable = stats.sem(of_seeds) * stats.t.ppf([0.975, POWER], freedom).sum() if freedom > 0 else float("nan")
    verdict, mean = _verdict(low, high, least), float(of_seeds.mean())
    return Order(cells, judged.shape[1], mean, low, high, verdict, float(detectable), len(of_seeds), most)


def _verdict(low: float, high: float, least: float) -> str:
    return HOLDS if low > least else FAILS if high < least else UNRESOLVED
