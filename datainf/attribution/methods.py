"""The influence methods: functions ``(G, V, lam) -> R`` of one layer, and what the rest of the package asks of them.

What the symbols stand for is said in `attribution.influence`. G is a tensor or a `storage.rows.Rows`, read in blocks.
Those that take the layer's matrix apart are in `attribution.kronecker`.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor

from datainf.attribution.kronecker import (
    ekfac,
    ekfac_solver,
    generalized_fisher,
    generalized_fisher_solver,
    kronecker,
    kronecker_solver,
)
from datainf.errors import InputError
from datainf.storage.memory import Needs
from datainf.storage.rows import PART, Matrix, double, gram, second_moment, square_norms

Method = Callable[..., Tensor]


def hessian_free(G: Matrix, V: Float[Tensor, "m d"], lam: float) -> Float[Tensor, "m d"]:
    """Take H for the identity: the score is the plain inner product of two gradients."""
    return V


def datainf(G: Matrix, V: Float[Tensor, "m d"], lam: float) -> Float[Tensor, "m d"]:
    """Average the inverses instead of inverting the average (paper Eq. 5); exact when n = 1.

    By the Sherman-Morrison formula (g g^T + lam I)^-1 v = (v - g (g.v) / (lam + ||g||^2)) / lam; averaged over the
    n gradients that is a second moment in which g_i has the weight 1 / (lam + ||g_i||^2): two matrix products. (The
    second line of the paper's Eq. 5 has the opposite overall sign; its first line and its Algorithm 1 agree with this.)
    """
    weights = 1 / (lam + square_norms(G))
    return (V - second_moment(G, V, weights)).div_(lam)


def exact(G: Matrix, V: Float[Tensor, "m d"], lam: float) -> Float[Tensor, "m d"]:
    """V H^-1 to rounding error, from the smaller of two symmetric systems and its Cholesky factor.

    Primal (d <= n): solve the d x d system (G^T G / n + lam I) r = v.
    Dual (d > n):    with K = G G^T, r = (v - G^T (n lam I + K)^-1 G v) / lam (Woodbury), an n x n system.

    In float64 throughout, whatever the type of G and V, and on the CPU if their device has no float64: the default
    damping lets the condition number of H reach 10 d + 1, which multiplies the rounding error of the Gram matrix as
    much as that of its factor.

    Raises:
        ValueError: if H is not positive definite in float64, which means that lam is too small for this layer.
    """
    return exact_solver(G, lam)(V)


def exact_solver(G: Matrix, lam: float) -> Callable[[Float[Tensor, "m d"]], Float[Tensor, "m d"]]:
    """`exact` as a function of V alone, which factorizes once for however many V."""
    (n, d), G64 = G.shape, double(G)
    if d <= n:
        U = _factor(gram(G64.T).div_(n), lam)
        return lambda V: _solve(U, double(V).T).T.to(V.dtype).to(V.device)
    return ExactDual(G64, _factor(gram(G64), n * lam), lam)


@dataclass(frozen=True)
class ExactDual:
    """The dual form, V -> R: G in float64, and the Cholesky factor U of n lam I + K, K = G G^T."""

    G: Matrix
    U: Float[Tensor, "n n"]
    lam: float

    def __call__(self, V: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        V64 = double(V)
        return ((V64 - _solve(self.U, self.G @ V64.T).T @ self.G) / self.lam).to(V.dtype).to(V.device)

    def products(self, V: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
        """R G^T without R, which is half the work: n V G^T (n lam I + K)^-1 (push-through identity)."""
        return (len(self.G) * _solve(self.U, self.G @ double(V).T).T).to(V.dtype).to(V.device)


def lissa(G: Matrix, V: Float[Tensor, "m d"], lam: float, iterations: int = 10) -> Float[Tensor, "m d"]:
    """r_0 = v, r_i = v + (I - H) r_(i-1): LiSSA as the paper writes it, with all n gradients at every step.

    Converges to the exact ihvp only while the largest eigenvalue of H is below 2, and diverges above.
    """
    R = V
    for _ in range(iterations):
        R = V + R - (second_moment(G, R) + lam * R)
    return R


def lissa_scaled(G: Matrix, V: Float[Tensor, "m d"], lam: float, iterations: int = 10) -> Float[Tensor, "m d"]:
    """LiSSA on step * H, with step = 1 / (largest eigenvalue + lam): converges for every G.

    r_0 = step v, r_i = r_(i-1) + step (v - H r_(i-1)). The largest eigenvalue is estimated by power iteration.
    """
    step = 1 / (largest_eigenvalue(G) + lam)
    R = step * V
    for _ in range(iterations):
        R = R + step * (V - second_moment(G, R) - lam * R)
    return R


def lissa_as_published(G: Matrix, V: Float[Tensor, "m d"], lam: float, iterations: int = 10) -> Float[Tensor, "m d"]:
    """The recursion of the authors' published code, which subtracts lam where the paper adds it.

    r_i = v + r_(i-1) - (G^T G / n - lam I) r_(i-1). Kept so that the published numbers can be understood.
    """
    return lissa(G, V, -lam, iterations)


METHODS: dict[str, Method] = {
    method.__name__: method
    for method in (
        *(hessian_free, datainf, lissa, lissa_scaled, lissa_as_published, exact),
        *(kronecker, ekfac, generalized_fisher),
    )
}
OF_ALL_LAYERS = ("joint", "cosine")
"""Names of what `influence` does with all layers together."""

SOLVERS = {
    exact: exact_solver,
    kronecker: kronecker_solver,
    ekfac: ekfac_solver,
    generalized_fisher: generalized_fisher_solver,
}
"""Method -> what of it does not depend on V, done once: ``(G, lam, ...) -> (V -> R)``, with what else it takes."""


def _factor(A: Float[Tensor, "k k"], shift: float) -> Float[Tensor, "k k"]:
    """The upper Cholesky factor U of A + shift I = U^T U, for a symmetric A given by its lower triangle.

    A may be the largest tensor about, so it is overwritten, and no copy of it is ever made: its transpose has the
    layout that LAPACK works on in place.
    """
    A.diagonal().add_(shift)
    failed = torch.empty((), dtype=torch.int32, device=A.device)
    U, _ = torch.linalg.cholesky_ex(A.mT, upper=True, out=(A.mT, failed))
    if failed.item():
        raise ValueError(
            f"The damped Hessian of size {len(A)} is not positive definite in float64: raise `damping` "
            f"(this layer's lam gives a shift of {shift:.1e})."
        )
    return U


def _solve(U: Float[Tensor, "k k"], B: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
    """(U^T U)^-1 B. Two triangular solves, since torch.cholesky_solve would copy U."""
    return torch.linalg.solve_triangular(U, torch.linalg.solve_triangular(U.mT, B, upper=False), upper=True)


def largest_eigenvalue(G: Matrix, iterations: int = 30) -> float:
    """The largest eigenvalue of G^T G / n, by power iteration from a fixed random vector (never above the truth)."""
    start = torch.randn(1, G.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = start.to(G.dtype).to(G.device)
    for _ in range(iterations):
        u = second_moment(G, u / u.norm())
    return u.norm().item()


# --- Names, and memory ------------------------------------------------------------------------------------------------


def resolve_method(method: str | Method, options: Mapping[str, object] | None = None) -> Method:
    """The function that a name stands for, with its options bound; a function stands for itself.

    A name may carry its iterations in parentheses: "lissa_scaled(100)" is lissa_scaled with iterations=100.

    Raises:
        InputError: there is no such method, it does not take such an option, or its iterations are no number from 1 on.
    """
    options = dict(options or {})
    if isinstance(method, str):
        if method in OF_ALL_LAYERS:
            raise InputError(f"{method} takes all layers together and gives no R of a layer: use influence.")
        name, iterations = re.fullmatch(r"(\w*)(?:\((\d+)\))?|.*", method, re.DOTALL).groups()
        if name not in METHODS:
            raise InputError(
                f"Unknown method {method!r}: choose one of {', '.join([*METHODS, *OF_ALL_LAYERS])}, or give a function."
            )
        method = METHODS[name]
        options |= {"iterations": int(iterations)} if iterations else {}
    taken = inspect.signature(method).parameters
    unknown = [name for name in options if name not in taken]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise InputError(f"{name_of(method)} takes no option {unknown[0]!r}.")
    iterations = options.get("iterations", 1)
    is_count = isinstance(iterations, Integral) and not isinstance(iterations, bool) and iterations > 0
    if is_built_in(method) and not is_count:
        raise InputError(f"iterations must be a whole number, 1 at least, not {iterations!r}.")
    return partial(method, **options) if options else method


def takes(method: Method, name: str) -> bool:
    """Whether a method is to be told something of each layer: its (out, in), as ``shape``, or its ``factors``."""
    parameter = inspect.signature(method).parameters.get(name)
    return parameter is not None and parameter.default is parameter.empty


def is_built_in(method: Method) -> bool:
    return getattr(method, "func", method) in METHODS.values()


def name_of(method: Method) -> str:
    """What a method is called, whatever options are bound to it."""
    return getattr(getattr(method, "func", method), "__name__", repr(method))


# How many vectors of d_l and of n numbers each method holds for every query, its scores included: read off the methods,
# and held against what torch's allocator counts by tests/attribution/test_influence.py.
VECTORS = {
    "hessian_free": (3, 3),
    "datainf": (4, 3),
    "lissa": (7, 3),
    "lissa_scaled": (7, 3),
    "lissa_as_published": (7, 3),
    "exact": (12, 9),
    "kronecker": (12, 3),
    "ekfac": (12, 3),
    "generalized_fisher": (12, 3),
}


def needs_of(
    method: Method, n: int, d: int, itemsize: int, at_hand: bool = False, shape: tuple[int, int] | None = None
) -> Needs:
    """What `method` holds beside gradients that are in memory already, and what `influence` does with its result.

    Counted in vectors of d and of n numbers for each query; those that are solved in float64 have them in that, and
    their matrices. A function of the user's is taken to hold as many as LiSSA.

    Args:
        shape: of the layer's matrix, for a method that takes it.
        at_hand: whether the layer is in memory in the type and on the device of the computation, so that blocks of it
            take no memory, but for the float64 ones of `exact`.
    """
    name = name_of(method) if is_built_in(method) else "lissa"
    d_vectors, n_vectors = VECTORS[name]
    per_query, fixed = (d_vectors * d + n_vectors * n) * itemsize, itemsize * 4 * n
    # The smallest block is one row, and another while it is read.
    if name == "exact":
        return Needs(fixed + 8 * min(n, d) ** 2, per_query, layer=8 * n * d, smallest_block=2 * 8 * max(n, d))
    if is_built_in(method) and shape is not None:
        # Both sides' matrices, their eigenvectors and what LAPACK works with; S and a part of it being added up.
        matrices = 8 * (6 * sum(size**2 for size in shape) + 4 * d)
        return Needs(fixed + matrices, per_query, layer=8 * n * d, smallest_block=4 * 8 * d)
    if at_hand:
        return Needs(fixed, per_query, layer=0, smallest_block=0)
    layer, row = itemsize * n * d, itemsize * d
    return Needs(
        fixed, per_query, layer, smallest_block=2 * row if is_built_in(method) else int(layer * (1 + PART)) + row
    )
