r"""Influence scores of training examples, in closed form and by iteration.

For one layer (one weight matrix, d parameters) let G (n, d) hold the per-sample gradients of the n training
examples, V (m, d) those of the m queries, and let

    H = G^T G / n + lam I

be the damped second moment of the gradients, which stands in for the Hessian of a negative log-likelihood
(Bartlett's second identity). A *method* maps ``(G, V, lam)`` to R (m, d), its approximation of V H^-1: the
inverse-Hessian-vector products (ihvp) of the queries. The influence of training example k on query j is then

    score[j, k] = - sum over layers of  R[j] . G[k]                                (paper Eq. 2)

**Sign, everywhere: score > 0 means that up-weighting this training example raises the query's loss (harmful),
score < 0 means that it lowers it (helpful).**

This module knows tensors and nothing else. G may also be a `datainf.rows.Rows`, a matrix read in blocks. Where several
processes were started (`datainf.processes`), each takes some of the layers.
"""

import inspect
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from datainf import processes, progress
from datainf.errors import InputError
from datainf.memory import Blocks, Memory, Needs, bytes_of, share_out
from datainf.rows import BLOCK_BYTES, PART, Matrix, Rows, Scratch, gram, second_moment, slices, square_norms

Method = Callable[..., Tensor]


# --- The methods: one function each, one layer at a time, (G, V, lam) -> R -----------------------------------------


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

    In float64 throughout, whatever the type of G and V: the default damping lets the condition number of H reach
    10 d + 1, which multiplies the rounding error of the Gram matrix as much as that of its factor.

    Raises:
        ValueError: if H is not positive definite in float64, which means that lam is too small for this layer.
    """
    return exact_solver(G, lam)(V)


def exact_solver(G: Matrix, lam: float) -> Callable[[Float[Tensor, "m d"]], Float[Tensor, "m d"]]:
    """`exact` as a function of V alone, which factorizes once for however many V."""
    (n, d), G64 = G.shape, G.double()
    if d <= n:
        U = _factor(gram(G64.T).div_(n), lam)
        return lambda V: _solve(U, V.double().T).T.to(V.dtype)
    U = _factor(gram(G64), n * lam)

    def dual(V: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        V64 = V.double()
        return ((V64 - _solve(U, G64 @ V64.T).T @ G64) / lam).to(V.dtype)

    return dual


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
    method.__name__: method for method in (hessian_free, datainf, lissa, lissa_scaled, lissa_as_published, exact)
}


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
    u = start.to(G.device, G.dtype)
    for _ in range(iterations):
        u = second_moment(G, u / u.norm())
    return u.norm().item()


# --- The scores -----------------------------------------------------------------------------------------------------


# How many vectors of d_l and of n numbers each method holds for every query, its scores included: read off the methods,
# and held against what torch's allocator counts by tests/test_influence.py.
VECTORS = {
    "hessian_free": (3, 3),
    "datainf": (4, 3),
    "lissa": (7, 3),
    "lissa_scaled": (7, 3),
    "lissa_as_published": (7, 3),
    "exact": (12, 9),
}


def layer_damping(G: Matrix, damping: float = 0.1) -> float:
    """lam_l = damping * (n d_l)^-1 * sum_i ||g_i||^2 (paper section 4): `damping` times H's mean eigenvalue."""
    n, d = G.shape
    return damping * square_norms(G).double().sum().item() / (n * d)


def influence(
    train: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    method: str | Method = "datainf",
    damping: float = 0.1,
    *,
    device: torch.device | str | None = None,
    memory: Memory = None,
    **options,
) -> Float[Tensor, "m n"]:
    """Influence of each of n training examples on each of m queries, summed over layers (paper Eq. 2).

    A layer at a time, and of that what `memory` leaves room for: DataInf reads the training gradients twice for as many
    queries as there is room for, or once where a whole layer is at hand. In several processes each takes some layers,
    and all return the same scores.

    Args:
        train: layer name -> per-sample training gradients G of shape (n, d_l): a `GradientStore` or any mapping.
        query: the same layers -> query gradients V of shape (m, d_l); ``query.mean()`` gives one query, the mean.
        method: a name in `METHODS` ("lissa_scaled(100)" sets its iterations), or a function ``(G, V, lam) -> R`` of
            shape (m, d_l). The methods of this module read G in blocks; a function of yours is given the whole layer
            as one Tensor.
        damping: the factor in `layer_damping`.
        device: where to compute; by default where the training gradients are.
        memory: the most bytes to hold on ``device`` at a time, such as "2GB", beside gradients that are in memory
            already. By default gradients are read in blocks of 256 MiB, and nothing else is bounded.
        **options: passed on to the method, such as ``iterations=100`` for the LiSSA family.

    Returns:
        Tensor (m, n). Positive: up-weighting the example raises the query's loss (harmful). Negative: helpful.

    Raises:
        ValueError: unknown method, layers or widths that differ between train and query, no examples, gradients
            that are not finite (names the example and the layer), a layer whose training gradients are all zero,
            `memory` that is too little (says how much is needed).
    """
    layers = _Layers(train, query, method, damping, device, memory, options)
    (total,) = layers.zeros((layers.m, layers.n))
    for _, G, parts in layers:
        for rows, R in parts:
            total[rows] -= R @ G.T
        del R  # before the next layer's
    return processes.add_up(total)


def ihvp(
    train: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    method: str | Method = "datainf",
    damping: float = 0.1,
    *,
    device: torch.device | str | None = None,
    memory: Memory = None,
    **options,
) -> dict[str, Float[Tensor, "m d"]]:
    """The first half of `influence`: layer name -> R (m, d_l), the inverse-Hessian-vector products of the queries.

    For those who time the two halves apart, or who keep R to score training examples that come later with
    `scores`. Arguments and errors as in `influence`. In several processes: of the layers that fall to this one.
    """
    layers = _Layers(train, query, method, damping, device, memory, options)
    shapes = [(layers.m, layers.widths[name]) for name in layers.mine]
    found = dict(zip(layers.mine, layers.zeros(*shapes), strict=True))
    for name, _, parts in layers:
        for rows, R in parts:
            found[name][rows] = R
        del R  # before the next layer's
    return found


def scores(
    train: Mapping[str, Tensor], ihvp: Mapping[str, Float[Tensor, "m d"]], *, memory: Memory = None
) -> Float[Tensor, "m n"]:
    """The second half of `influence`: score[j, k] = - sum over layers of R[j] . G[k], shape (m, n)."""
    memory = None if memory is None else bytes_of(memory)
    # A process to which no layer fell learns the number of queries from the others.
    m, first = max(processes.collect([len(R) for R in ihvp.values()])), layer_rows(train, next(iter(train)))
    like = next(iter(ihvp.values()), first)
    scratch, total = Scratch(), torch.zeros(m, len(first), device=like.device, dtype=first.dtype)
    for name, R in ihvp.items():
        G = layer_rows(train, name, R.device, scratch=scratch)
        (n, d), size = G.shape, G.dtype.itemsize
        needs = Needs(fixed=4 * len(R) * n * size, per_query=0, layer=n * d * size, smallest_block=2 * d * size)
        G = G.to(block_bytes=share_out(memory, f"layer {name!r}", needs, kept=0, queries=len(R)).block_bytes)
        total = total - R @ G.T
    return processes.add_up(total)


def self_influence(
    train: Mapping[str, Tensor],
    method: str | Method = "datainf",
    damping: float = 0.1,
    *,
    device: torch.device | str | None = None,
    memory: Memory = None,
    **options,
) -> Float[Tensor, " n"]:
    """The influence of every training example on its own loss, shape (n,): the diagonal of ``influence(train, train)``.

    Never positive for a positive definite H, since up-weighting an example lowers its own loss; the most negative
    scores belong to the examples that the model fits mostly by themselves. Arguments and errors as in `influence`.
    """
    layers = _Layers(train, train, method, damping, device, memory, options, in_blocks=True)
    (total,) = layers.zeros((layers.n,))
    for _, G, parts in layers:
        for rows, R in parts:
            total[rows] -= (R * G.tensor(rows)).sum(dim=1)
        del R  # before the next layer's
    return processes.add_up(total)


class _Layers:
    """What `influence`, `ihvp` and `self_influence` share: their arguments, checked, and the layers one at a time.

    Iterating yields (layer name, G, parts), where parts yields (slice of query numbers, R of those queries): all
    queries at once where `memory` allows it. Whether it allows anything is seen before the first layer is begun.
    """

    def __init__(self, train, query, method, damping, device, memory, options, in_blocks=False):
        self.method = resolve_method(method, options)
        check_pair(train, query, damping)
        self.train, self.query, self.damping, self.in_blocks = train, query, damping, in_blocks
        self.memory = None if memory is None else bytes_of(memory)
        shapes = {name: layer_rows(train, name).shape for name in train}
        self.widths = {name: d for name, (_, d) in shapes.items()}
        self.mine = processes.my_share(self.widths)
        first = next(iter(train))
        self.n, self.m = shapes[first][0], layer_rows(query, first).shape[0]
        like = layer_rows(train, first, device)
        self.device, self.dtype = like.device, like.dtype
        # The squared norms of all layers are kept by a store.
        self._kept = self.n * len(self.widths) * self.dtype.itemsize

    def zeros(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Tensors for all results, made when it is seen that what they leave of the memory will do."""
        self._kept += sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize
        self._shared_out = {name: self._blocks(name) for name in self.mine}
        return [torch.zeros(*shape, device=self.device, dtype=self.dtype) for shape in shapes]

    def __iter__(self) -> Iterator[tuple[str, Rows, Iterator[tuple[slice, Tensor]]]]:
        blocks, scratch = self._shared_out, Scratch()
        began, what = time.monotonic(), name_of(self.method)
        for name in progress.bar(self.mine, desc=what, unit="layer"):
            scratch.shrink(blocks[name].block_bytes)
            options = {"block_bytes": blocks[name].block_bytes, "scratch": scratch}
            G = layer_rows(self.train, name, self.device, **options)
            if not _is_built_in(self.method):  # which is given all of it, and nobody another copy
                G = Rows.of(G.tensor())
            yield name, G, self._parts(name, G, blocks[name].queries)
            if name == self.mine[0]:
                share = self.widths[name] / sum(self.widths[mine] for mine in self.mine)
                progress.say_if_long(f"{what}, {self.n} x {self.m} examples", share, time.monotonic() - began)

    def _parts(self, name: str, G: Rows, queries: int) -> Iterator[tuple[slice, Tensor]]:
        rows_of_V = layer_rows(self.query, name, self.device, dtype=G.dtype)
        solve = solver_of(self.method, name, G, self.damping)
        for rows in slices(self.m, queries):
            V = rows_of_V.tensor(rows)
            check_finite("query", name, square_norms(V), rows.start)
            R = solve(V)
            if not torch.linalg.vector_norm(R, ord=torch.inf).isfinite():
                what = f"{name_of(self.method)} diverged in layer {name!r}"
                warnings.warn(f"{what}; scores that it enters are not numbers.", stacklevel=3)
            yield rows, R

    def _blocks(self, name: str) -> Blocks:
        d, G = self.widths[name], layer_rows(self.train, name, self.device)
        most = self.m if not self.in_blocks else max(1, BLOCK_BYTES // (d * G.dtype.itemsize))
        needs = needs_of(self.method, self.n, d, G.dtype.itemsize, at_hand=G.is_at_hand)
        what = f"{name_of(self.method)} on layer {name!r}"
        return share_out(self.memory, what, needs, kept=self._kept, queries=min(self.m, most))


def needs_of(method: Method, n: int, d: int, itemsize: int, at_hand: bool = False) -> Needs:
    """What `method` holds beside gradients that are in memory already, and what `influence` does with its result.

    Counted in vectors of d and of n numbers for each query; `exact` has them in float64, and its matrix. A function of
    the user's is taken to hold as many as LiSSA.

    Args:
        at_hand: whether the layer is in memory in the type and on the device of the computation, so that blocks of it
            take no memory, but for the float64 ones of `exact`.
    """
    name = name_of(method) if _is_built_in(method) else "lissa"
    d_vectors, n_vectors = VECTORS[name]
    per_query, fixed = (d_vectors * d + n_vectors * n) * itemsize, itemsize * 4 * n
    # The smallest block is one row, and another while it is read.
    if name == "exact":
        return Needs(fixed + 8 * min(n, d) ** 2, per_query, layer=8 * n * d, smallest_block=2 * 8 * max(n, d))
    if at_hand:
        return Needs(fixed, per_query, layer=0, smallest_block=0)
    layer, row = itemsize * n * d, itemsize * d
    return Needs(
        fixed, per_query, layer, smallest_block=2 * row if _is_built_in(method) else int(layer * (1 + PART)) + row
    )


def resolve_method(method: str | Method, options: Mapping[str, object] | None = None) -> Method:
    """The function that a name stands for, with its options bound; a function stands for itself.

    A name may carry its iterations in parentheses: "lissa_scaled(100)" is lissa_scaled with iterations=100.

    Raises:
        InputError: there is no such method, or it does not take such an option.
    """
    options = dict(options or {})
    if isinstance(method, str):
        name, iterations = re.fullmatch(r"(\w*)(?:\((\d+)\))?|.*", method, re.DOTALL).groups()
        if name not in METHODS:
            raise InputError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}, or give a function.")
        method = METHODS[name]
        options |= {"iterations": int(iterations)} if iterations else {}
    taken = inspect.signature(method).parameters
    unknown = [name for name in options if name not in taken]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise InputError(f"{name_of(method)} takes no option {unknown[0]!r}.")
    return partial(method, **options) if options else method


def _is_built_in(method: Method) -> bool:
    return getattr(method, "func", method) in METHODS.values()


def solver_of(
    method: Method, name: str, G: Rows, damping: float
) -> Callable[[Float[Tensor, "m d"]], Float[Tensor, "m d"]]:
    """V -> R = method(G, V, lam) for the layer called `name`, after the checks that need the layer's numbers."""
    check_finite("training", name, square_norms(G))
    lam = layer_damping(G, damping)
    if lam == 0:
        raise ValueError(
            f"Every training gradient of layer {name!r} is zero, so its damping is zero and H has no inverse: "
            "leave the layer out, or fine-tune first (the gradient of lora_A is zero while lora_B is still zero)."
        )
    if method is exact:
        return exact_solver(G, lam)
    G = G if _is_built_in(method) else G.tensor()
    return lambda V: method(G, V, lam)


def layer_rows(
    gradients: Mapping[str, Tensor],
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options,
) -> Rows:
    """The rows of one layer, in float32 at least; read lazily where the mapping offers it (`GradientStore.rows`)."""
    rows = gradients.rows(name) if hasattr(gradients, "rows") else Rows.of(gradients[name])
    dtype = dtype or torch.promote_types(rows.dtype, torch.float32)
    return rows.to(device=device or rows.device, dtype=dtype, **options)


# --- What can be wrong with the input -------------------------------------------------------------------------------


def check_pair(train: Mapping[str, Tensor], query: Mapping[str, Tensor], damping: float) -> None:
    """Refuse gradients that cannot be compared: other layers, other widths, no examples; and damping <= 0."""
    if damping <= 0:
        raise ValueError(f"damping must be positive, not {damping}: without it H has no inverse when d_l > n.")
    if not train:
        raise ValueError("There are no layers: the training gradients are an empty mapping.")
    if missing := sorted(set(train) ^ set(query)):
        name = missing[0]
        raise ValueError(
            f"Train and query gradients must be of the same layers, but {len(missing)} are in one alone: "
            f"layer {name!r} is missing from the {'query' if name in train else 'training'} gradients."
        )
    n_of = {}
    for name in train:
        shapes = [tuple(layer_rows(side, name).shape) for side in (train, query)]
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1]:
            raise ValueError(
                f"Layer {name!r} has shape {shapes[0]} in train and {shapes[1]} in query; "
                "both must be (examples, d_l) with the same d_l."
            )
        for side, (examples, _) in zip(("training", "query"), shapes, strict=True):
            if examples == 0:
                raise ValueError(f"There are no {side} examples: layer {name!r} has no rows.")
            if n_of.setdefault(side, examples) != examples:
                raise ValueError(f"Layer {name!r} has {examples} {side} rows where the others have {n_of[side]}.")


def check_finite(side: str, name: str, squares: Float[Tensor, " n"], first: int = 0) -> None:
    """Refuse gradients that are not finite, naming the first such example; `squares` are the squared norms of those
    from number `first` on."""
    bad = (~torch.isfinite(squares)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"The gradient of {side} example {first + bad[0].item()} in layer {name!r} is not finite "
            f"({len(bad)} of {len(squares)} examples): look at that example's loss, or drop it."
        )


def name_of(method: Method) -> str:
    """What a method is called, whatever options are bound to it."""
    return getattr(getattr(method, "func", method), "__name__", repr(method))
