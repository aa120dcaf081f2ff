"""Scores along a path of damping, from one decomposition of each layer: no method is solved anew for each value.

The rows C that H is made of are the training gradients G where no others are given. With K = C C^T = U S U^T, a method
that is a function f of C^T C / n has

    V f(C^T C / n) G^T = f(0) V G^T + V C^T U ((f(S / n) - f(0)) / S) U^T C G^T

DataInf and the Kronecker methods have forms of their own. All of it is in float64 and takes n x n numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from datainf.attribution.damping import check_damping
from datainf.attribution.inputs import OneLayer, check_finite, check_pair, layer_rows, told
from datainf.attribution.kronecker import (
    Basis,
    Factors,
    Shape,
    ekfac_basis,
    generalized_fisher_basis,
    kronecker_basis,
    matrices,
)
from datainf.attribution.methods import (
    Method,
    datainf,
    ekfac,
    exact,
    generalized_fisher,
    hessian_free,
    kronecker,
    largest_eigenvalue,
    lissa,
    lissa_scaled,
    name_of,
    resolve_method,
)
from datainf.errors import InputError
from datainf.evaluation.counterfactual import difference, lds, lds_table
from datainf.evaluation.retraining import Bank
from datainf.progress import bar
from datainf.storage.rows import Rows, double, gram, square_norms

Damped = Float[Tensor, "dampings m n"]


def damping_path(
    train: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    method: str | Method,
    dampings: Sequence[float],
    *,
    curvature: Mapping[str, Tensor] | None = None,
    factors: Mapping[str, Factors] | None = None,
    device: torch.device | str | None = None,
) -> Damped:
    """`influence` for every damping of a path, in float64.

    Args:
        method: a name of `PATHS`, with its iterations where it has some, or "joint".
        dampings: each times the mean eigenvalue of a layer is its lam.
        train, query, curvature, factors, device: as of `influence`.

    Returns:
        Tensor (len(dampings), m, n).

    Raises:
        InputError: the method has no path, and as `influence`.
    """
    for damping in dampings:
        check_damping(damping)
    if method == "joint":
        train, query, curvature = (side and OneLayer(side) for side in (train, query, curvature))
        method = exact
    method = resolve_method(method)
    path = PATHS.get(getattr(method, "func", method))
    if path is None:
        raise InputError(f"{name_of(method)} has no path of damping: choose one of {', '.join(map(name_of, PATHS))}.")
    check_pair(train, query)
    if curvature is not None:
        check_pair(train, curvature, "curvature")
    rows_of_h = train if curvature is None else curvature
    known = told(rows_of_h, method, factors)
    options, total = getattr(method, "keywords", {}), 0
    for name in bar(list(train), desc=f"{name_of(method)}, {len(dampings)} dampings", unit="layer"):
        G, V, C = (double(layer_rows(side, name, device)) for side in (train, query, rows_of_h))
        for what, rows in (("training", G), ("query", V), ("curvature", C)):
            check_finite(what, name, square_norms(rows))
        layer = _Layer(G, V.tensor(), C, **known[name])
        if not layer.mean_eigenvalue > 0:
            raise InputError(f"Every gradient of layer {name!r} is zero, so that H has no inverse: leave it out.")
        total = total - path(layer, [damping * layer.mean_eigenvalue for damping in dampings], **options)
    return total


def best_damping(bank: Bank, path: Float[np.ndarray, "dampings m n"], dampings: Sequence[float]) -> float:
    """The damping by which the mean LDS over the queries is the largest. It is chosen on these retrainings, so judge it
    on others. Errors as of `counterfactual.lds`."""
    return dampings[int(np.argmax([lds(bank, scores).mean() for scores in path]))]


def judged_apart(
    bank: Bank,
    paths: Mapping[str, Float[np.ndarray, "dampings m n"]],
    dampings: Sequence[float],
    *,
    over: str = "datainf",
    draws: int = 400,
    seed: int = 0,
) -> pd.DataFrame:
    """Every method at its `best_damping` on every other retraining, judged on the rest: a maximum over many dampings
    flatters itself.

    Returns:
        A row per method: its ``damping``, its ``lds``, and the ``gain`` over the method `over`, in pairs, with its 95%
        interval from ``low`` to ``high``.

    Raises:
        InputError: fewer than twice `counterfactual.FEWEST` retrainings, and as `counterfactual.lds`.
    """
    first, rest = bank.halves()
    best = {method: best_damping(first, path, dampings) for method, path in paths.items()}
    scores = {method: path[dampings.index(best[method])] for method, path in paths.items()}
    table, drawn = lds_table(rest, scores, draws=draws, seed=seed)
    gains = [difference(drawn[method], drawn[over]) for method in paths]
    found = pd.DataFrame(gains, columns=["gain", "low", "high"], index=pd.Index(paths, name="method"))
    return found.assign(damping=best, lds=table["lds"])[["damping", "lds", "gain", "low", "high"]].reset_index()


@dataclass
class _Layer:
    """What the paths of one layer are made of, each made when it is first asked for."""

    G: Rows
    V: Float[Tensor, "m d"]
    C: Rows
    shape: Shape | None = None
    factors: Factors | None = None

    @cached_property
    def mean_eigenvalue(self) -> float:
        return square_norms(self.C).sum().item() / (self.C.shape[0] * self.C.shape[1])

    @cached_property
    def VG(self) -> Float[Tensor, "m n"]:
        return self.V @ self.G.T

    @cached_property
    def VC(self) -> Float[Tensor, "m k"]:
        return self.V @ self.C.T

    @cached_property
    def CG(self) -> Float[Tensor, "k n"]:
        return torch.cat([block @ self.G.T for _, block in self.C.blocks()])

    def of(self, functions: Sequence[Callable[[Tensor], Tensor]]) -> Damped:
        """V f(C^T C / n) G^T for each function f of the eigenvalues."""
        S, U = torch.linalg.eigh(gram(self.C), UPLO="L")
        left, right, zero = self.VC @ U, U.T @ self.CG, S.new_zeros(1)
        known = S > len(S) * torch.finfo(S.dtype).eps * S[-1]  # in the others' directions there is nothing
        S = torch.where(known, S, 1)
        found = []
        for f in functions:
            weights = torch.where(known, (f(S / len(S)) - f(zero)) / S, 0)
            found.append(f(zero) * self.VG + (left * weights) @ right)
        return torch.stack(found)


def _hessian_free(layer: _Layer, lams: Sequence[float]) -> Damped:
    return layer.VG.expand(len(lams), -1, -1)


def _datainf(layer: _Layer, lams: Sequence[float]) -> Damped:
    squares, n = square_norms(layer.C), len(layer.C)
    return torch.stack([(layer.VG - (layer.VC / (lam + squares)) @ layer.CG / n) / lam for lam in lams])


def _exact(layer: _Layer, lams: Sequence[float]) -> Damped:
    return layer.of([lambda s, lam=lam: 1 / (s + lam) for lam in lams])


def _lissa(layer: _Layer, lams: Sequence[float], iterations: int = 10) -> Damped:
    return layer.of([_iterated(lam, 1.0, iterations) for lam in lams])


def _lissa_scaled(layer: _Layer, lams: Sequence[float], iterations: int = 10) -> Damped:
    top = largest_eigenvalue(layer.C)
    return layer.of([_iterated(lam, 1 / (top + lam), iterations) for lam in lams])


def _iterated(lam: float, step: float, iterations: int) -> Callable[[Tensor], Tensor]:
    """What so many steps from step v make of 1 / (s + lam): r = step + (1 - step (s + lam)) r, again and again."""

    def function(s: Tensor) -> Tensor:
        r = torch.full_like(s, step)
        for _ in range(iterations):
            r = step + (1 - step * (s + lam)) * r
        return r

    return function


def _in_basis(basis_of: Callable[..., Basis]) -> Callable[[_Layer, Sequence[float]], Damped]:
    """The path of a method that divides by S + lam in the basis of two matrices' products."""

    def path(layer: _Layer, lams: Sequence[float]) -> Damped:
        left, right, S = basis_of(layer.C, layer.shape, *([] if layer.factors is None else [layer.factors]))
        V = left.T @ layer.V.view(-1, *layer.shape) @ right
        found = layer.V.new_empty(len(lams), len(V), len(layer.G))
        first = 0
        for part in matrices(layer.G, layer.shape):
            rotated = (left.T @ part @ right).flatten(1).T
            for place, lam in enumerate(lams):
                found[place, :, first : first + len(part)] = (V / (S + lam)).flatten(1) @ rotated
            first += len(part)
        return found

    return path


PATHS: dict[Method, Callable[..., Damped]] = {
    hessian_free: _hessian_free,
    datainf: _datainf,
    lissa: _lissa,
    lissa_scaled: _lissa_scaled,
    exact: _exact,
    kronecker: _in_basis(kronecker_basis),
    ekfac: _in_basis(ekfac_basis),
    generalized_fisher: _in_basis(generalized_fisher_basis),
}
"""Method -> ``(layer, lams) -> V f G^T`` for each lam."""
