"""Influence scores of training examples, in closed form and by iteration.

For one layer (one weight matrix, d parameters) let G (n, d) hold the per-sample gradients of the n training
examples, V (m, d) those of the m queries, and let

    H = G^T G / n + lam I

be the damped second moment of the gradients, which stands in for the Hessian of a negative log-likelihood
(Bartlett's second identity). H may also be made of other rows than those that are scored, such as the true Fisher's.
A *method* maps ``(G, V, lam)`` to R (m, d), its approximation of V H^-1: the
inverse-Hessian-vector products (ihvp) of the queries. The influence of training example k on query j is then

    score[j, k] = - sum over layers of  R[j] . G[k]                                (paper Eq. 2)

**Sign, everywhere: score > 0 means that up-weighting this training example raises the query's loss (harmful),
score < 0 means that it lowers it (helpful).**

The methods are in `attribution.methods`; here they meet layers, queries, a budget of memory and, where several were
started, other processes. Both modules know tensors and nothing else.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datainf import processes, progress
from datainf.attribution.damping import Damping, check_damping, layer_damping
from datainf.attribution.inputs import (
    OneLayer,
    check_device,
    check_finite,
    check_pair,
    check_products,
    layer_rows,
    told,
)
from datainf.attribution.kronecker import Factors
from datainf.attribution.methods import (
    METHODS,
    OF_ALL_LAYERS,
    SOLVERS,
    Method,
    datainf,
    exact,
    hessian_free,
    is_built_in,
    lissa,
    lissa_as_published,
    lissa_scaled,
    name_of,
    needs_of,
    resolve_method,
)
from datainf.errors import InputError
from datainf.storage.memory import Blocks, Memory, Needs, bytes_of, share_out
from datainf.storage.rows import BLOCK_BYTES, Rows, Scratch, slices, square_norms

__all__ = [
    "METHODS",
    "Method",
    "datainf",
    "exact",
    "hessian_free",
    "ihvp",
    "influence",
    "layer_damping",
    "lissa",
    "lissa_as_published",
    "lissa_scaled",
    "resolve_method",
    "scores",
    "self_influence",
    "suspects",
]


def influence(
    train: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    method: str | Method = "datainf",
    damping: Damping = 0.1,
    *,
    curvature: Mapping[str, Tensor] | None = None,
    factors: Mapping[str, Factors] | None = None,
    aggregate: str = "sum",
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
            as one Tensor. One with a parameter ``shape`` is told the layer's (out, in) besides. Two names take all
            layers together: "joint" is exact with one H for all, "cosine" the cosine of the whole gradients, negated.
        damping: the factor in `layer_damping`, or layer name -> its own, as `damping_of_training` gives.
        curvature: the same layers -> the rows (n', d_l) that H and its damping are made of; by default `train`.
        factors: the same layers -> what `kronecker_factors` finds of them, for "ekfac".
        aggregate: "sum" adds up the layers' scores, as the paper; "ranks" their ranks among the training examples, each
            from -1 (the most helpful) to 1, so that no layer counts for more than another.
        device: where to compute; by default where the training gradients are.
        memory: the most bytes to hold on ``device`` at a time, such as "2GB", beside gradients that are in memory
            already. By default gradients are read in blocks of 256 MiB, and nothing else is bounded.
        **options: passed on to the method, such as ``iterations=100`` for the LiSSA family.

    Returns:
        Tensor (m, n). Positive: up-weighting the example raises the query's loss (harmful). Negative: helpful.

    Raises:
        ValueError: unknown method, layers or widths that differ between train and query, no examples, gradients
            that are not finite (names the example and the layer), a layer whose training gradients are all zero,
            `damping` that is not positive or not finite, a `device` that is not there, `memory` that is no size or too
            little (says how much is needed).
    """
    if aggregate not in ("sum", "ranks"):
        raise InputError(f"aggregate must be 'sum' or 'ranks', not {aggregate!r}.")
    if aggregate == "ranks" and method in OF_ALL_LAYERS:
        raise InputError(f"{method} takes all layers together, so that there are no ranks to add: leave aggregate out.")
    if method == "cosine":
        return _cosine(train, query, device=device, memory=memory)
    if method == "joint":
        check_pair(train, query)
        if isinstance(damping, Mapping):
            raise InputError("joint has one damping for all layers: give a number.")
        train, query, curvature = _as_one_layer(train, query, curvature)
        method = exact
    layers = _Layers(train, query, method, damping, device, memory, options, curvature, factors, products=True)
    (total,) = layers.zeros((layers.m, layers.n))
    processes.begin("influence")
    for _, _, parts in layers:
        for rows, products in parts:
            total[rows] += _ranks(-products) if aggregate == "ranks" else -products
        del products  # before the next layer's
    return processes.add_up(total)


def _ranks(scores: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Each score's rank in its row, from -1 to 1; equal scores have the mean of theirs."""
    ordered, n = scores.sort(dim=1).values, scores.shape[1]
    below = torch.searchsorted(ordered, scores)
    not_above = torch.searchsorted(ordered, scores, right=True)
    return (below + not_above - n).to(scores.dtype) / n


def ihvp(
    train: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    method: str | Method = "datainf",
    damping: Damping = 0.1,
    *,
    curvature: Mapping[str, Tensor] | None = None,
    factors: Mapping[str, Factors] | None = None,
    device: torch.device | str | None = None,
    memory: Memory = None,
    **options,
) -> dict[str, Float[Tensor, "m d"]]:
    """The first half of `influence`: layer name -> R (m, d_l), the inverse-Hessian-vector products of the queries.

    For those who time the two halves apart, or who keep R to score training examples that come later with
    `scores`. Arguments and errors as in `influence`. In several processes: of the layers that fall to this one.
    """
    layers = _Layers(train, query, method, damping, device, memory, options, curvature, factors)
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
    """The second half of `influence`: score[j, k] = - sum over layers of R[j] . G[k], shape (m, n).

    Raises:
        ValueError: `ihvp` is of other layers or widths, there are no layers, or `memory` is too little or no size.
    """
    memory = None if memory is None else bytes_of(memory)
    check_products(train, ihvp)
    processes.begin("scores")
    # A process to which no layer fell learns the number of queries from the others.
    m, first = max(processes.collect([len(R) for R in ihvp.values()]), default=0), layer_rows(train, next(iter(train)))
    if m == 0:
        raise ValueError("There are no query examples: `ihvp` has no layers or no rows.")
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
    damping: Damping = 0.1,
    *,
    curvature: Mapping[str, Tensor] | None = None,
    factors: Mapping[str, Factors] | None = None,
    device: torch.device | str | None = None,
    memory: Memory = None,
    **options,
) -> Float[Tensor, " n"]:
    """The influence of every training example on its own loss, shape (n,): the diagonal of ``influence(train, train)``.

    Never positive for a positive definite H, since up-weighting an example lowers its own loss; the most negative
    scores belong to the examples that the model fits mostly by themselves. Arguments and errors as in `influence`.
    """
    if method == "joint":
        train, curvature = _as_one_layer(train, curvature)
        method = exact
    layers = _Layers(train, train, method, damping, device, memory, options, curvature, factors, in_blocks=True)
    (total,) = layers.zeros((layers.n,))
    processes.begin("self_influence")
    for _, G, parts in layers:
        for rows, R in parts:
            total[rows] -= (R * G.tensor(rows)).sum(dim=1)
        del R  # before the next layer's
    return processes.add_up(total)


def suspects(
    train: Mapping[str, Tensor],
    query: Mapping[str, Tensor] | None = None,
    method: str | Method = "datainf",
    damping: Damping = 0.1,
    **options,
) -> Int[Tensor, " n"]:
    """The training examples' places, the most suspicious first, whichever way that is in the scores.

    With queries, those whose up-weighting raises the mean query's loss most: the highest influence. Without, those that
    the model fits mostly by themselves: the most negative self-influence. Arguments and errors as in `influence`.
    """
    if query is None:
        return self_influence(train, method, damping, **options).argsort(stable=True)
    return influence(train, query, method, damping, **options).mean(dim=0).argsort(descending=True, stable=True)


def _as_one_layer(*sides: Mapping[str, Tensor] | None) -> list[Mapping[str, Tensor] | None]:
    """What `joint` is `exact` of: H as one block of all D parameters, with a damping by its mean eigenvalue."""
    return [None if side is None else OneLayer(side) for side in sides]


def _cosine(train: Mapping[str, Tensor], query: Mapping[str, Tensor], **where) -> Float[Tensor, "m n"]:
    """The cosine of the whole gradients, all layers together, with the sign of an influence."""
    products = influence(train, query, hessian_free, **where)
    norms = [sum(layer_rows(side, name).square_norms for name in side).sqrt().to(products) for side in (query, train)]
    return products / torch.outer(*norms).clamp(min=torch.finfo(products.dtype).tiny)


class _Layers:
    """What `influence`, `ihvp` and `self_influence` share: their arguments, checked, and the layers one at a time.

    Iterating yields (layer name, G, parts), where parts yields (slice of query numbers, R of those queries), or R G^T
    where `products` is asked for: all queries at once where `memory` allows it. Whether it allows anything is seen
    before the first layer is begun.
    """

    def __init__(
        self,
        train,
        query,
        method,
        damping,
        device,
        memory,
        options,
        curvature,
        factors,
        *,
        in_blocks=False,
        products=False,
    ):
        self.method = resolve_method(method, options)
        check_device(device)
        check_pair(train, query)
        check_damping(damping, train)
        if curvature is not None:
            check_pair(train, curvature, "curvature")
        self.train, self.query, self.damping = train, query, damping
        self.in_blocks, self.products = in_blocks, products
        self.curvature = train if curvature is None else curvature
        self.told = told(self.curvature, self.method, factors)
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
            H_rows = G
            if self.curvature is not self.train:
                check_finite("training", name, square_norms(G))
                H_rows = layer_rows(self.curvature, name, self.device, dtype=G.dtype, **options)
            elif not is_built_in(self.method):  # which is given all of it, and nobody another copy
                H_rows = G = Rows.of(G.tensor())
            yield name, G, self._parts(name, G, H_rows, blocks[name].queries)
            if name == self.mine[0]:
                share = self.widths[name] / sum(self.widths[mine] for mine in self.mine)
                progress.say_if_long(f"{what}, {self.n} x {self.m} examples", share, time.monotonic() - began)

    def _parts(self, name: str, G: Rows, H_rows: Rows, queries: int) -> Iterator[tuple[slice, Tensor]]:
        rows_of_V = layer_rows(self.query, name, self.device, dtype=H_rows.dtype)
        side = "training" if self.curvature is self.train else "curvature"
        own = self.damping[name] if isinstance(self.damping, Mapping) else self.damping
        solve = result = solver_of(self.method, name, H_rows, own, self.told[name], side)
        if self.products:
            # Some know R G^T without R, of the rows that their H is made of.
            direct = getattr(solve, "products", None) if H_rows is G else None
            result = direct or (lambda V: solve(V) @ G.T)
        for rows in slices(self.m, queries):
            V = rows_of_V.tensor(rows)
            check_finite("query", name, square_norms(V), rows.start)
            found = result(V)
            if not torch.linalg.vector_norm(found, ord=torch.inf).isfinite():
                what = f"{name_of(self.method)} diverged in layer {name!r}"
                warnings.warn(f"{what}; scores that it enters are not numbers.", stacklevel=3)
            yield rows, found

    def _blocks(self, name: str) -> Blocks:
        d, G = self.widths[name], layer_rows(self.train, name, self.device)
        most = self.m if not self.in_blocks else max(1, BLOCK_BYTES // (d * G.dtype.itemsize))
        n = max(self.n, layer_rows(self.curvature, name).shape[0])
        needs = needs_of(self.method, n, d, G.dtype.itemsize, at_hand=G.is_at_hand, shape=self.told[name].get("shape"))
        what = f"{name_of(self.method)} on layer {name!r}"
        return share_out(self.memory, what, needs, kept=self._kept, queries=min(self.m, most))


def solver_of(
    method: Method,
    name: str,
    G: Rows,
    damping: float,
    known: Mapping[str, object],
    side: str = "training",
) -> Callable[[Float[Tensor, "m d"]], Float[Tensor, "m d"]]:
    """V -> R = method(G, V, lam) for the layer called `name`, after the checks that need the layer's numbers."""
    squares = square_norms(G)
    check_finite(side, name, squares)
    if not squares.any():
        raise ValueError(
            f"Every {side} gradient of layer {name!r} is zero, so its damping is zero and H has no inverse: "
            "leave the layer out, or fine-tune first (the gradient of lora_A is zero while lora_B is still zero)."
        )
    lam = layer_damping(G, damping)
    if not 0 < lam < math.inf:
        raise InputError(f"damping={damping:g} gives layer {name!r} the damping {lam:g}: choose one nearer to 0.1.")
    if is_built_in(method) and method in SOLVERS:
        return SOLVERS[method](G, lam, **known)
    G = G if is_built_in(method) else G.tensor()
    return lambda V: method(G, V, lam, **known)
