"""The path of damping against each method, solved anew for every value."""

import pytest
import torch
from layered import FACTORS, Layers, Streamed, gradients, pair

import datainf
from datainf.errors import InputError
from datainf.evaluation.damping import PATHS, damping_path

DAMPINGS = [0.001, 0.1, 1, 30, 1000]
METHODS = [*(method.__name__ for method in PATHS), "lissa_scaled(100)", "joint"]


@pytest.mark.parametrize("n", [9, 50])  # fewer rows than a layer has parameters, and more
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["own rows", "other rows", "streamed"])
def test_every_point_is_the_method_itself(method, n, kind):
    train, query = pair(n=n)
    if method == "lissa":  # which diverges where an eigenvalue of H is above 2
        train, query = (Layers({name: 1e-2 * rows for name, rows in side.items()}) for side in (train, query))
    other = None
    if kind == "other rows":
        other = Layers({name: 0.5 * gradients(13, G.shape[1], seed=20) for name, G in train.items()})
        other = Layers({name: rows * (1e-2 if method == "lissa" else 1) for name, rows in other.items()})
    sides = [Streamed(side) if kind == "streamed" else side for side in (train, query)]
    found = damping_path(*sides, method, DAMPINGS, curvature=other, factors=FACTORS)
    assert found.shape == (len(DAMPINGS), 4, n) and found.dtype == torch.float64
    for damping, scores in zip(DAMPINGS, found, strict=True):
        expected = datainf.influence(train, query, method, damping, curvature=other, factors=FACTORS)
        assert (scores - expected).norm() <= 1e-9 * expected.norm(), damping


def test_float32_gradients_are_computed_in_float64():
    train, query = pair(dtype=torch.float32)
    found = damping_path(train, query, "exact", [0.1])[0]
    wide = (Layers({name: rows.double() for name, rows in side.items()}) for side in (train, query))
    torch.testing.assert_close(found, datainf.influence(*wide, "exact", 0.1))


@pytest.mark.parametrize(
    ("method", "dampings", "sentence"),
    [
        ("lissa_as_published", [0.1], "lissa_as_published has no path of damping: choose one of hessian_free, datainf"),
        ("exact", [0.1, -1], "damping must be positive and finite, a number such as 0.1, not -1"),
        ("datainv", [0.1], "Unknown method 'datainv'"),
        ("cosine", [0.1], "cosine takes all layers together and gives no R of a layer"),
    ],
)
def test_what_has_no_path_is_refused(method, dampings, sentence):
    with pytest.raises(InputError, match=sentence):
        damping_path(*pair(), method, dampings)


def test_spoiled_gradients_are_named():
    train, query = pair()
    train["b"][3, 1] = float("nan")
    with pytest.raises(ValueError, match="The gradient of training example 3 in layer 'b' is not finite"):
        damping_path(train, query, "exact", [0.1])
    train["b"][:] = 0
    with pytest.raises(InputError, match="Every gradient of layer 'b' is zero"):
        damping_path(train, query, "exact", [0.1])
