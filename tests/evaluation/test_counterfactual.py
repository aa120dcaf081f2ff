"""What retraining says of scores, where the truth is known: by brute force, by scipy and by construction."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from datainf.errors import InputError
from datainf.evaluation import counterfactual, damping, retraining
from datainf.evaluation.retraining import SAME, Bank
from datainf.study.provenance import ROOT

N, M = 60, 12
rng = np.random.default_rng(3)
X = np.c_[rng.standard_normal((N, 3)), np.ones(N)]
Y = np.where(rng.random(N) < 1 / (1 + np.exp(-X @ [1.5, -1, 0.5, 0.2])), 1.0, -1.0)
QX, QY = np.c_[rng.standard_normal((M, 3)), np.ones(M)], rng.choice([-1.0, 1.0], M)
PENALTY = 0.05


def fitted(weight):
    """The minimum of the weighted mean of log(1 + exp(-y x'w)) and a penalty, by Newton's method."""
    w = np.zeros(X.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(Y * (X @ w)))
        gradient = -(weight * p * Y) @ X / N + PENALTY * w
        hessian = (X.T * (weight * p * (1 - p))) @ X / N + PENALTY * np.eye(len(w))
        w = w - np.linalg.solve(hessian, gradient)
    return w


def losses_at(w):
    return np.log1p(np.exp(-QY * (QX @ w)))


def outcome_of(one):
    losses = losses_at(fitted(one.kept.astype(float)))
    return losses.astype("float32"), losses < np.log(2)


def influence():
    """-(gradient of the query) H^-1 (gradient of the example), the exact influence."""
    w = fitted(np.ones(N))
    p, q = 1 / (1 + np.exp(Y * (X @ w))), 1 / (1 + np.exp(QY * (QX @ w)))
    G, V = -(p * Y)[:, None] * X, -(q * QY)[:, None] * QX
    hessian = (X.T * (p * (1 - p))) @ X / N + PENALTY * np.eye(X.shape[1])
    return -V @ np.linalg.solve(hessian, G.T)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    plan = [
        retraining.full(N, batches=SAME),
        *retraining.leave_one_out(N),
        *retraining.subsets(N, 0.05, 80, batches=SAME),
        retraining.without_top(influence().mean(axis=0), 0.05, "exact", batches=SAME),
        retraining.without_top(-influence().mean(axis=0), 0.05, "upside down", batches=SAME),
    ]
    return retraining.bank(plan, outcome_of, {}, tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="module")
def alone(truth):
    return truth.select(design="leave_one_out")


def true_scores(alone):
    """What leaving each example out does to every query, as scores (m, n)."""
    base = losses_at(fitted(np.ones(N)))
    return -N * (alone.losses.T.astype(float) - base[:, None])


def test_the_true_changes_predict_themselves(truth, alone):
    scores = true_scores(alone)
    np.testing.assert_allclose(counterfactual.lds(alone, scores), 1)
    assert counterfactual.lds_of_mean(alone, scores) == pytest.approx(1)
    base = truth.select(design="full")
    slopes = counterfactual.calibration(alone, scores, base, draws=20)
    for slope in slopes.values():
        assert slope.value == pytest.approx(1, abs=1e-3) and slope.low <= slope.value <= slope.high


def test_influence_agrees_with_brute_force(truth, alone):
    """As in notebook 00."""
    scores = influence()
    expected = counterfactual.predicted(alone, scores)
    base = truth.select(design="full")
    actual = (alone.losses - base.losses).T
    assert stats.pearsonr(expected.ravel(), actual.ravel()).statistic > 0.98
    assert counterfactual.lds(alone, scores).mean() > 0.97
    subsets = truth.select(design="subset")
    assert counterfactual.lds(subsets, scores).mean() > 0.97
    slope = counterfactual.calibration(alone, scores, base, draws=20)["every_query"]
    assert slope.value == pytest.approx(1, abs=0.1)


def test_a_damping_is_judged_on_other_retrainings_than_it_was_chosen_on(truth):
    bank, rng = truth.select(design="subset"), np.random.default_rng(4)
    chosen_on, judged_on = bank.halves()
    assert not set(chosen_on.rows["number"]) & set(judged_on.rows["number"])
    assert len(chosen_on) + len(judged_on) == len(bank)
    noise, dampings = rng.standard_normal((2, 3, M, N)), [0.1, 1, 10]
    paths = {"datainf": noise[0], "exact": np.stack([noise[1][0], influence(), noise[1][1]])}
    found = damping.judged_apart(bank, paths, dampings, draws=50).set_index("method")
    assert found.loc["exact", "damping"] == 1
    best = found.loc["datainf", "damping"]
    assert best == max(dampings, key=lambda at: counterfactual.lds(chosen_on, noise[0][dampings.index(at)]).mean())
    lds = counterfactual.lds(judged_on, noise[0][dampings.index(best)]).mean()
    assert found.loc["datainf", ["lds", "gain", "low", "high"]].tolist() == pytest.approx([lds, 0, 0, 0])
    assert found.loc["exact", "low"] > 0.5


def test_lds_is_scipys_spearman(truth):
    bank, scores = truth.select(design="subset"), np.random.default_rng(0).standard_normal((M, N))
    predicted = np.array([[-scores[j][~kept].sum() / N for kept in bank.kept] for j in range(M)])
    np.testing.assert_allclose(counterfactual.predicted(bank, scores), predicted, atol=1e-12)
    expected = [stats.spearmanr(predicted[j], bank.losses[:, j]).statistic for j in range(M)]
    np.testing.assert_allclose(counterfactual.lds(bank, scores), expected)
    of_mean = stats.spearmanr(predicted.mean(axis=0), bank.losses.astype(float).mean(axis=1)).statistic
    assert counterfactual.lds_of_mean(bank, scores) == pytest.approx(of_mean)


def test_the_table_ranks_methods_and_says_which_order_is_resolved(truth):
    bank, exact = truth.select(design="subset"), influence()
    noise = np.random.default_rng(1).standard_normal((M, N)) * exact.std()
    methods = {"noisy": exact + noise, "exact": exact, "as good": 2 * exact, "random": noise, "nothing": 0 * exact}
    table, draws = counterfactual.lds_table(bank, methods, draws=200)
    assert table.index[-1] in ("random", "nothing") and set(table.index[:2]) == {"exact", "as good"}
    assert (table["low"] <= table["lds"]).all() and (table["lds"] <= table["high"]).all()
    assert table.loc["nothing", "lds"] == 0
    for name, each in methods.items():
        assert table.loc[name, "lds"] == pytest.approx(counterfactual.lds(bank, each).mean())
    order = counterfactual.neighbours(draws).set_index("method")
    first = order.iloc[0]
    assert first["difference"] == 0 and not first["resolved"]  # twice the scores are as good
    assert order.loc[order["next"] == "noisy", "resolved"].item()


def test_the_intervals_cover_what_more_retrainings_would_show(tmp_path):
    """Intervals over subsets, from 40 of them, beside the LDS of 400 others: 95% should cover, most do."""
    plan = retraining.subsets(N, 0.5, 800, batches=SAME)
    whole = retraining.bank(plan, outcome_of, {}, tmp_path)
    noise = np.random.default_rng(2).standard_normal((M, N)) * influence().std()
    scores = influence() + 2 * noise
    expected, covered = counterfactual.lds(whole._at(np.arange(400, 800)), scores).mean(), 0
    for part in range(10):
        table, _ = counterfactual.lds_table(whole._at(np.arange(40 * part, 40 * part + 40)), {"it": scores}, draws=200)
        covered += table["low_subsets"].item() <= expected <= table["high_subsets"].item()
    assert covered >= 8


def noisy_bank(noise: float, count: int = 200) -> tuple[Bank, Bank, np.ndarray]:
    """Losses that are linear in who is kept, plus chance; all once more; and the true scores."""
    draw = np.random.default_rng(4)
    scores = draw.standard_normal((M, N))
    plan = retraining.subsets(N, 0.5, count)
    signal = np.array([-(scores @ (~one.kept)) for one in plan])

    def made(each):
        rows = pd.DataFrame([one.key for one in each], columns=retraining.KEY)
        losses = signal + noise * signal.std(axis=0) * draw.standard_normal(signal.shape)
        return Bank({}, rows, np.array([one.kept for one in each]), losses.astype("float32"))

    return made(plan), made(retraining.repeats(plan)), scores


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_the_ceiling_is_what_a_perfect_predictor_reaches(noise):
    bank, repeated, scores = noisy_bank(noise)
    found = counterfactual.ceiling(bank, repeated, draws=100)
    assert found.value == pytest.approx(1 / np.sqrt(1 + noise**2), abs=0.05)
    assert found.low <= found.value <= found.high
    assert counterfactual.lds(bank, scores).mean() == pytest.approx(found.value, abs=0.05)
    # Of a few of them, in another order of rows, the interval is wider and holds it.
    few = counterfactual.ceiling(bank, repeated._at(np.arange(20)[::-1]), draws=100)
    assert few.low - 0.05 <= found.value <= few.high + 0.05 and few.high - few.low >= found.high - found.low
    with pytest.raises(InputError, match="2 subsets were retrained twice"):
        counterfactual.ceiling(bank, repeated._at(np.arange(2)))


def test_reliability_tells_queries_that_are_predicted_from_those_that_are_not():
    bank, _, scores = noisy_bank(0.5)
    half = scores.copy()
    half[: M // 2] = np.random.default_rng(5).standard_normal((M // 2, N))
    assert counterfactual.reliability(bank, half) > 0.9
    assert counterfactual.reliability(bank, scores) < 0.9


def test_removing_the_most_helpful_hurts(truth):
    table = counterfactual.without_top(truth, batches=SAME, draws=200).set_index("method")
    assert (table["removed"] == 3).all()
    assert table.loc["exact", "low"] > 0 > table.loc["upside down", "high"]
    base = truth.select(design="full")
    (top,) = truth.select(design="without_top", method="exact").losses
    others = truth.select(design="subset")
    assert table.loc["exact", "qld"] == pytest.approx((top - others.losses.mean(axis=0)).mean(), abs=1e-6)
    (answers,) = truth.select(design="without_top", method="exact").right
    assert table.loc["exact", "flips"] == (answers != base.right[0]).mean()
    assert table.loc["exact", "flips_random"] == pytest.approx((others.right != base.right[0]).mean())
    bare = replace(truth, right=None)
    assert "flips" not in counterfactual.without_top(bare, batches=SAME, draws=20)


def test_bad_input_is_one_sentence(truth):
    bank, scores = truth.select(design="subset"), influence()
    few = bank._at(np.arange(9))
    still = replace(bank, losses=np.where(np.arange(M) == 4, np.float32(1), bank.losses))
    for call, sentence in (
        (lambda: counterfactual.lds(bank, scores.T), r"Scores have shape \(60, 12\), but the bank has 12 queries, 60"),
        (lambda: counterfactual.lds(bank, np.where(scores > 0, np.nan, scores)), "not finite.*did not converge"),
        (lambda: counterfactual.lds(few, scores), "The bank has 9 such retrainings.*takes 10 at least"),
        (lambda: counterfactual.lds_table(few, {"exact": scores}), "The bank has 9 such retrainings"),
        (lambda: counterfactual.lds(still, scores), "The loss of query 4 never changes"),
        (lambda: counterfactual.without_top(truth.select(design="subset")), "no retraining with all examples"),
        (
            lambda: counterfactual.without_top(_without(truth, "subset"), batches=SAME),
            "No random removals of 3 examples",
        ),
    ):
        with pytest.raises(InputError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
    mixed = retraining.joined([bank, replace(bank, rows=bank.rows.assign(batches="own"))])
    with pytest.raises(InputError, match="the two are not compared"):
        counterfactual.lds(mixed, scores)


def _without(bank: Bank, design: str) -> Bank:
    return bank._at(np.flatnonzero(bank.rows["design"] != design))


def test_scores_from_elsewhere_are_tested_by_a_published_bank_in_five_lines():
    """A stranger's method, which has nothing to do with the package."""
    text = (ROOT / "docs" / "your_own.md").read_text(encoding="utf8")
    code = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Bank.load" in block][-1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    bank = Bank.load(re.search(r'Bank.load\("(.*?)"\)', code)[1])
    scores = np.random.default_rng(0).standard_normal((bank.losses.shape[1], bank.kept.shape[1]))
    process = subprocess.run(
        [sys.executable, "-c", f"import numpy as np\nscores = np.array({scores.round(3).tolist()})\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert abs(float(process.stdout.split()[-1])) < 0.3  # chance
