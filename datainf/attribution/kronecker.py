"""Methods that know a layer's d_l parameters as a matrix (out, in), and H as a product of what acts on its two sides.

They are functions ``(G, V, lam, shape, ...) -> R`` of one layer, as those of `attribution.methods`, in float64 (but for
`generalized_fisher`, whose H is well conditioned). Row i of G is the gradient G_i (out, in), row by row.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from datainf.storage.rows import PART, Matrix, Rows, double, gram, slices

Shape = tuple[int, int]
Solver = Callable[[Float[Tensor, "m d"]], Float[Tensor, "m d"]]
Factors = tuple[Float[Tensor, "out out"], Float[Tensor, "in in"]]
Basis = tuple[Float[Tensor, "out out"], Float[Tensor, "in in"], Float[Tensor, "out in"]]
"""U, W and S: in the basis of the products of U's and W's columns, H is taken to be diagonal, with the entries S."""


def kronecker(G: Matrix, V: Float[Tensor, "m d"], lam: float, shape: Shape) -> Float[Tensor, "m d"]:
    """H with the eigenvectors of a Kronecker product: eigenvalue-corrected Shampoo, from the stored gradients.

    The columns of U and W are the eigenvectors of the means of G_i G_i^T and of G_i^T G_i. In the basis of their
    products H is taken to be diagonal, with the mean of (U^T G_i W)^2 as its entries S, which no other diagonal comes
    nearer with (George et al., 2018):

        R = U ((U^T V W) / (S + lam)) W^T

    Exact where H is diagonal in that basis, as for any G of shape (n, 1, d) or (n, d, 1).
    """
    return kronecker_solver(G, lam, shape)(V)


def kronecker_solver(G: Matrix, lam: float, shape: Shape) -> Solver:
    """`kronecker` as a function of V alone."""
    return _solver(kronecker_basis(double(G), shape), lam, shape)


def kronecker_basis(G: Matrix, shape: Shape) -> Basis:
    """U, W and S of `kronecker`."""
    return _eigenvalue_corrected(G, shape, [_mean_square(G, shape, by_rows) for by_rows in (False, True)])


def ekfac(G: Matrix, V: Float[Tensor, "m d"], lam: float, shape: Shape, factors: Factors) -> Float[Tensor, "m d"]:
    """`kronecker` in another basis: EK-FAC's (George et al., 2018; Grosse et al., 2023).

    The columns of U and W are the eigenvectors of the layer's `factors`, the second moments of what comes back to its
    outputs and of what goes into it, token by token, as `gradients.factors.kronecker_factors` finds them; S and R are
    as of `kronecker`.
    """
    return ekfac_solver(G, lam, shape, factors)(V)


def ekfac_solver(G: Matrix, lam: float, shape: Shape, factors: Factors) -> Solver:
    """`ekfac` as a function of V alone."""
    return _solver(ekfac_basis(double(G), shape, factors), lam, shape)


def ekfac_basis(G: Matrix, shape: Shape, factors: Factors) -> Basis:
    """U, W and S of `ekfac`."""
    return _eigenvalue_corrected(G, shape, [double(side).to(G.device) for side in factors])


def _eigenvalue_corrected(G: Matrix, shape: Shape, sides: Sequence[Tensor]) -> Basis:
    """The eigenvectors of both sides, and H's diagonal in the basis of their products."""
    left, right = (torch.linalg.eigh(side).eigenvectors for side in sides)
    return left, right, sum((left.T @ part @ right).square().sum(dim=0) for part in matrices(G, shape)) / len(G)


def generalized_fisher(G: Matrix, V: Float[Tensor, "m d"], lam: float, shape: Shape) -> Float[Tensor, "m d"]:
    """H that acts alike on all rows of the matrix: HyperINF's generalized Fisher information, solved exactly.

    With F = the mean of G_i^T G_i over the examples and the `out` rows, R = V (F + lam I)^-1; where out > in, the same
    of the transposed matrices. (HyperINF (Zhou et al., 2024) adds the rows up instead, which is another damping, and
    inverts by an iteration.)
    """
    return generalized_fisher_solver(G, lam, shape)(V)


def generalized_fisher_solver(G: Matrix, lam: float, shape: Shape) -> Solver:
    """`generalized_fisher` as a function of V alone, by a Cholesky factor of F + lam I.

    F is added up in the type of G, as DataInf's products are, factorized in float64, and solved with in the type of G,
    which is as good as F itself: solving by triangles is stable.
    """
    by_rows = shape[1] >= shape[0]
    F = double(_mean_square(G, shape, by_rows)) / min(shape)
    F.diagonal().add_(lam)
    L = torch.linalg.cholesky(F).to(G.dtype)

    def solve(V: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Of the matrices with their long side last, all rows at once."""
        rows = V.to(L).view(-1, *shape)
        rows = rows if by_rows else rows.mT
        return torch.cholesky_solve(rows.reshape(-1, len(F)).T, L).T.view(rows.shape)

    if by_rows:
        return lambda V: solve(V).flatten(1).to(V)
    return lambda V: solve(V).mT.flatten(1).to(V)


def generalized_fisher_basis(G: Matrix, shape: Shape) -> Basis:
    """The eigenvectors of F on its side and nothing on the other, and its eigenvalues, the same for all rows."""
    by_rows = shape[1] >= shape[0]
    S, W = torch.linalg.eigh(_mean_square(G, shape, by_rows) / min(shape))
    nothing = torch.eye(min(shape), dtype=W.dtype, device=W.device)
    return (nothing, W, S.expand(shape)) if by_rows else (W, nothing, S[:, None].expand(shape))


def _solver(basis: Basis, lam: float, shape: Shape) -> Solver:
    """V -> U ((U^T V W) / (S + lam)) W^T."""
    left, right, S = basis

    def solve(V: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        rotated = left.T @ double(V).view(-1, *shape) @ right
        return (left @ rotated.div_(S + lam) @ right.T).flatten(1).to(V.dtype).to(V.device)

    return solve


def _mean_square(G: Matrix, shape: Shape, by_rows: bool) -> Float[Tensor, "side side"]:
    """The lower triangle of the mean of G_i^T G_i, or, not `by_rows`, of G_i G_i^T."""
    size = shape[1] if by_rows else shape[0]
    total = torch.zeros(size, size, dtype=G.dtype, device=G.device)
    if by_rows:  # which all lie one under the other
        for _, block in (G if isinstance(G, Rows) else Rows.of(G)).blocks():
            total += gram(block.reshape(-1, size).T)
    else:
        for part in matrices(G, shape):
            total += gram(part.transpose(0, 1).flatten(1))
    return total / len(G)


def matrices(G: Matrix, shape: Shape) -> Iterator[Float[Tensor, "k out in"]]:
    """The gradients as matrices, a few at a time, so that what is made of them takes little beside a block."""
    for _, block in (G if isinstance(G, Rows) else Rows.of(G)).blocks():
        for rows in slices(len(block), max(1, int(len(block) * PART / 4))):
            yield block[rows].reshape(-1, *shape)
