"""What retraining says of scores: do they predict what the queries' losses become without some of the examples?

Scores (m, n) are influences, in nats: leaving example i out is predicted to change query j's loss by -scores[j, i] / n,
and leaving out several by the sum. Other scores, such as a similarity, are judged by their order alone.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from datainf.errors import InputError
from datainf.evaluation.retraining import OWN, SAME, Bank

Scores = Float[np.ndarray, "m n"]
FEWEST = 10
"""Subsets, below which a rank correlation says nothing."""


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def predicted(bank: Bank, scores: Scores) -> Float[np.ndarray, "m s"]:
    """The change of each query's loss that the scores predict for every retraining, in nats: leaving an example out is
    a weight of -1 / n on it, and weights add up.

    Raises:
        InputError: scores of other examples or queries than the bank's, or not all finite.
    """
    scores = np.asarray(scores, dtype=float)
    expected = (bank.losses.shape[1], bank.kept.shape[1])
    if scores.shape != expected:
        raise InputError(
            f"Scores have shape {scores.shape}, but the bank has {expected[0]} queries, {expected[1]} examples."
        )
    if not np.isfinite(scores).all():
        raise InputError("Some scores are not finite, as of an iteration that did not converge: leave the method out.")
    return -scores @ (~bank.kept).T / expected[1]


def lds(bank: Bank, scores: Scores) -> Float[np.ndarray, " m"]:
    """The linear datamodeling score of every query: Spearman's correlation, over the retrainings, of its loss and
    the predicted change of it (Park et al., 2023, TRAK).

    Raises:
        InputError: fewer than `FEWEST` retrainings, a query whose loss never changes, and as `predicted`.
    """
    _check_subsets(bank)
    return _spearman(predicted(bank, scores), bank.losses.T.astype(float))


def lds_of_mean(bank: Bank, scores: Scores) -> float:
    """The LDS of the mean query: of the mean loss, by the mean of the queries' scores. Errors as of `lds`."""
    _check_subsets(bank)
    of_mean = predicted(bank, scores).mean(axis=0, keepdims=True)
    return float(_spearman(of_mean, bank.losses.mean(axis=1, dtype=float)[None])[0])


def lds_table(
    bank: Bank, scores: Mapping[str, Scores], *, draws: int = 1000, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every method's LDS with its 95% bootstrap intervals.

    Returns:
        A row per method, the best first: ``lds`` (mean over the queries) with ``low`` and ``high`` of queries and
        subsets drawn anew together, ``low_queries`` ... ``high_subsets`` of one of the two alone; ``lds_of_mean``
        (the mean query) with its interval over subsets; ``reliability`` (see `reliability`). And the draws, a column
        per method, by which differences are judged in pairs (`neighbours`).

    Raises:
        InputError: as of `lds`.
    """
    _check_subsets(bank)
    rng = np.random.default_rng(seed)
    s, m = bank.losses.shape
    actual, of_mean = bank.losses.T.astype(float), bank.losses.mean(axis=1, dtype=float)[None]
    values = {name: predicted(bank, each) for name, each in scores.items()}
    resampled = {what: {name: np.empty(draws) for name in values} for what in ("both", "queries", "subsets", "of_mean")}
    full = {name: _spearman(each, actual) for name, each in values.items()}
    for draw in range(draws):  # the same for all methods, so that they can be compared in pairs
        queries, subsets = rng.integers(m, size=m), _two_at_least(rng, s)
        ranks, ranks_of_mean = _ranks(actual[:, subsets]), _ranks(of_mean[:, subsets])
        for name, each in values.items():
            again = _correlation(_ranks(each[:, subsets]), ranks)
            resampled["both"][name][draw] = again[queries].mean()
            resampled["subsets"][name][draw] = again.mean()
            resampled["queries"][name][draw] = full[name][queries].mean()
            mean = each.mean(axis=0, keepdims=True)
            resampled["of_mean"][name][draw] = _correlation(_ranks(mean[:, subsets]), ranks_of_mean)[0]
    rows = {}
    for name, each in values.items():
        rows[name] = {
            "lds": full[name].mean(),
            **_limits(resampled["both"][name]),
            **_limits(resampled["queries"][name], "_queries"),
            **_limits(resampled["subsets"][name], "_subsets"),
            "lds_of_mean": _spearman(each.mean(axis=0, keepdims=True), of_mean)[0],
            **_limits(resampled["of_mean"][name], "_of_mean"),
            "reliability": reliability(bank, scores[name]),
        }
    table = pd.DataFrame(rows).T.rename_axis("method").sort_values("lds", ascending=False)
    return table, pd.DataFrame(resampled["both"])


def difference(draws: pd.Series, others: pd.Series) -> Estimate:
    """By how much one LDS is above another, of draws of the same queries and subsets for both."""
    of_each = draws - others
    return Estimate(of_each.mean(), *np.nanquantile(of_each, [0.025, 0.975]))


def neighbours(draws: pd.DataFrame) -> pd.DataFrame:
    """Is the order of methods resolved? For each method and the next one, by their mean: the difference with its 95%
    interval, of draws that were made for all together; ``resolved`` where the interval excludes 0."""
    order = draws.mean().sort_values(ascending=False).index
    rows = []
    for better, worse in zip(order[:-1], order[1:], strict=True):
        above, low, high = difference(draws[better], draws[worse])
        rows.append({"method": better, "next": worse, "difference": above, "low": low, "high": high})
    table = pd.DataFrame(rows, columns=["method", "next", "difference", "low", "high"])
    return table.assign(resolved=(table["low"] > 0) | (table["high"] < 0))


def reliability(bank: Bank, scores: Scores) -> float:
    """Are some queries predicted better than others, or does it only look so? The correlation over queries of their LDS
    from every other retraining with that from the rest, for the full number of retrainings (Spearman-Brown)."""
    one, other = (_spearman(predicted(half, scores), half.losses.T.astype(float)) for half in bank.halves())
    r = stats.pearsonr(one, other).statistic if len(one) > 2 and np.ptp(one) and np.ptp(other) else np.nan
    return float(2 * r / (1 + r))


def ceiling(bank: Bank, repeated: Bank, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """What a perfect predictor would reach: the LDS of the losses' expectations, when part of the losses is chance.

    Some subsets were retrained twice, in other batches and with other dropout. Over those, a query's two losses
    correlate by rho, the part of their variance that is not chance, and each of them with its expectation by sqrt(rho).
    The correlation is Spearman's, the mean over the queries, and the interval of queries and subsets drawn anew.

    Args:
        bank: retrainings without random subsets.
        repeated: some of them in another order.

    Raises:
        InputError: fewer than three subsets were retrained twice.
    """
    first = {number: at for at, number in enumerate(bank.rows["number"])}
    again = [at for at, number in enumerate(repeated.rows["number"]) if number in first]
    if len(again) < 3:
        raise InputError(f"{len(again)} subsets were retrained twice, in another order; the noise takes 3 to be known.")
    one = bank.losses[[first[repeated.rows["number"][at]] for at in again]].T.astype(float)
    other = repeated.losses[again].T.astype(float)

    def of(subsets: Int[np.ndarray, " k"], queries: Int[np.ndarray, " m"]) -> float:
        return float(np.sqrt(np.clip(_spearman(one[:, subsets], other[:, subsets])[queries].mean(), 0, 1)))

    rng, (m, k) = np.random.default_rng(seed), one.shape
    resampled = [of(_two_at_least(rng, k), rng.integers(m, size=m)) for _ in range(draws)]
    return Estimate(of(np.arange(k), np.arange(m)), *np.quantile(resampled, [0.025, 0.975]))


def without_top(bank: Bank, *, batches: str = SAME, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """What becomes of the queries without the examples that a method holds for the most helpful.

    Returns:
        A row per method and number removed. ``qld``, the query loss difference: the mean loss then, above that of
        random removals of as many, in nats, with its 95% bootstrap interval over queries and random removals.
        ``flips``: the share of queries whose answer was right with all examples and is wrong then, or the other way
        round, and ``flips_random``; absent where there are no answers.

    Raises:
        InputError: no random removals of as many.
    """
    rng = np.random.default_rng(seed)
    base, rows = _base(bank, batches), []
    for at in np.flatnonzero((bank.rows["design"] == "without_top") & (bank.rows["batches"] == batches)):
        method, removed = bank.rows.loc[at, ["method", "removed"]]
        others = bank.select(design="subset", removed=removed, batches=batches)
        if not len(others):
            raise InputError(f"No random removals of {removed} examples are in the bank to compare {method} with.")
        difference = bank.losses[at].astype(float) - others.losses.astype(float)  # (removals, m)
        again = []
        for _ in range(draws):
            chosen = rng.integers(len(others), size=len(others))
            again.append(
                difference[chosen].mean(axis=0)[rng.integers(difference.shape[1], size=difference.shape[1])].mean()
            )
        flips = (
            {}
            if bank.right is None
            else {
                "flips": (bank.right[at] != base.right[0]).mean(),
                "flips_random": (others.right != base.right[0]).mean(),
            }
        )
        rows.append(
            {"method": method, "removed": removed, "qld": difference.mean(), **_limits(np.array(again)), **flips}
        )
    return pd.DataFrame(rows)


def calibration(bank: Bank, scores: Scores, base: Bank, *, draws: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """By how much the loss changes where the scores say 1 nat: the slope of the actual change against the predicted.

    1 where scores are what they say, 0 where they say nothing; that of a method that has the order right and
    exaggerates ten times is 0.1.

    Args:
        base: retrainings with all examples, from whose mean loss changes are counted.

    Returns:
        ``mean_query`` and ``every_query`` (all of them in one regression), each slope with its 95% bootstrap interval
        over the retrainings.
    """
    expected = predicted(bank, scores)
    actual = (bank.losses - base.losses.mean(axis=0)).T.astype(float)
    rng = np.random.default_rng(seed)
    found = {}
    for name, (x, y) in {
        "mean_query": (expected.mean(axis=0, keepdims=True), actual.mean(axis=0, keepdims=True)),
        "every_query": (expected, actual),
    }.items():
        again = []
        for _ in range(draws):
            subsets = _two_at_least(rng, len(bank))
            again.append(_slope(x[:, subsets], y[:, subsets]))
        found[name] = Estimate(_slope(x, y), *np.nanquantile(again, [0.025, 0.975]))
    return found


def _slope(x: Float[np.ndarray, "m s"], y: Float[np.ndarray, "m s"]) -> float:
    return float(stats.linregress(x.ravel(), y.ravel()).slope) if np.ptp(x) > 0 else float("nan")


def _base(bank: Bank, batches: str) -> Bank:
    """The retraining with all examples, in the recipe's own order.

    Raises:
        InputError: the bank has none.
    """
    base = bank.select(design="full", batches=batches, order=-1)
    if not len(base):
        raise InputError("The bank has no retraining with all examples, from which changes are counted.")
    return base


def _check_subsets(bank: Bank) -> None:
    if len(bank) < FEWEST:
        raise InputError(f"The bank has {len(bank)} such retrainings; a correlation over them takes {FEWEST} at least.")
    if bank.rows["batches"].nunique() > 1:
        raise InputError(f"Choose the retrainings with batches {OWN!r} or {SAME!r}: the two are not compared.")
    same = (bank.losses == bank.losses[0]).all(axis=0)
    if same.any():
        raise InputError(
            f"The loss of query {np.flatnonzero(same)[0]} never changes, so that nothing predicts it: leave it out."
        )


def _spearman(one: Float[np.ndarray, "m s"], other: Float[np.ndarray, "m s"]) -> Float[np.ndarray, " m"]:
    """Spearman's correlation of each row with the other's."""
    return _correlation(_ranks(one), _ranks(other))


def _ranks(values: Float[np.ndarray, "m s"]) -> Float[np.ndarray, "m s"]:
    """The ranks within each row, above their mean."""
    return stats.rankdata(values, axis=1) - (values.shape[1] + 1) / 2


def _correlation(one: Float[np.ndarray, "m s"], other: Float[np.ndarray, "m s"]) -> Float[np.ndarray, " m"]:
    """Of rows whose mean is 0; 0 where a row has one value only, which predicts nothing."""
    norms = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    return np.divide((one * other).sum(axis=1), norms, out=np.zeros(len(one)), where=norms > 0)


def _two_at_least(rng: np.random.Generator, s: int) -> Int[np.ndarray, " s"]:
    """s of s drawn with replacement, not all the same."""
    while len(np.unique(drawn := rng.integers(s, size=s))) < 2:
        pass
    return drawn


def _limits(draws: np.ndarray, what: str = "") -> dict[str, float]:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {f"low{what}": low, f"high{what}": high}
