"""A matrix of gradients seen through blocks of its rows, so that it need not fit in memory.

The influence methods are written as matrix equations in G of shape (n, d). `Rows` gives them those products
(`V @ G.T`, `C @ G`, `G @ G.T`, `G.T @ G`, the squared row norms) while holding one block of rows at a time, so
the same line of code reads as its equation for a tensor in memory and for a layer that lives on disk.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

BLOCK_BYTES = 256 * 2**20


class Rows:
    """A lazy (n, d) matrix, read in blocks of consecutive rows.

    Args:
        read: ``read(start, stop)`` returns rows start..stop-1 as a Tensor of shape (stop - start, d).
        shape: (n, d).
        device, dtype: where and in which type each block is handed to the products.
        block_bytes: the most bytes that one block may take on ``device``.
    """

    def __init__(
        self,
        read: Callable[[int, int], Tensor],
        shape: tuple[int, int],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        block_bytes: int = BLOCK_BYTES,
    ):
        self.read, self.shape, self.device, self.dtype = read, shape, torch.device(device), dtype
        self.block_bytes = block_bytes

    @classmethod
    def of(cls, tensor: Tensor, **options) -> "Rows":
        """The rows of a tensor that is in memory; a block is a view where neither device nor type changes."""
        options = {"device": tensor.device, "dtype": tensor.dtype} | options
        return cls(lambda start, stop: tensor[start:stop], tuple(tensor.shape), **options)

    def __len__(self) -> int:
        return self.shape[0]

    def double(self) -> "Rows":
        """The same rows, handed out in float64."""
        return Rows(self.read, self.shape, device=self.device, dtype=torch.float64, block_bytes=self.block_bytes)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of row numbers, block of rows on ``device`` in ``dtype``), in order."""
        if self.is_one_block:
            yield slice(0, len(self)), self._only_block
            return
        for start in range(0, len(self), self._block_rows):
            stop = min(len(self), start + self._block_rows)
            yield slice(start, stop), self._block(start, stop)

    @property
    def is_one_block(self) -> bool:
        """Whether the whole matrix fits in a block."""
        return len(self) <= self._block_rows

    @property
    def _block_rows(self) -> int:
        return max(1, self.block_bytes // max(1, self.shape[1] * self.dtype.itemsize))

    @cached_property
    def _only_block(self) -> Tensor:
        """A matrix of one block is read once, however many products it enters."""
        return self._block(0, len(self))

    def _block(self, start: int, stop: int) -> Tensor:
        return self.read(start, stop).to(self.device, self.dtype)

    def tensor(self) -> Tensor:
        """The whole matrix in memory, shape (n, d)."""
        return self._only_block if self.is_one_block else torch.cat([block for _, block in self.blocks()])

    @cached_property
    def square_norms(self) -> Tensor:
        """||g_i||^2 of every row, shape (n,)."""
        return torch.cat([square_norms(block) for _, block in self.blocks()])

    @property
    def T(self) -> "_Columns":
        return _Columns(self)

    def __rmatmul__(self, C: Tensor) -> Tensor:
        """C @ G for C of shape (m, n): a sum over blocks, shape (m, d)."""
        product = C.new_zeros(C.shape[0], self.shape[1])
        for rows, block in self.blocks():
            product.addmm_(C[:, rows], block)
        return product

    def __matmul__(self, right) -> Tensor:
        """G @ X for X of shape (d, k), or G @ G.T: block by block, shape (n, k)."""
        return torch.cat([block @ right for _, block in self.blocks()])

    # Without this, torch would try to read a Rows on the right of `@` as a tensor instead of calling __rmatmul__.
    __torch_function__ = classmethod(lambda cls, *args, **kwargs: NotImplemented)


class _Columns:
    """The transpose of a `Rows`, of shape (d, n): only ever a factor in a product."""

    __torch_function__ = classmethod(lambda cls, *args, **kwargs: NotImplemented)

    def __init__(self, rows: Rows):
        self.rows = rows

    def __rmatmul__(self, V: Tensor) -> Tensor:
        """V @ G.T for V of shape (m, d), shape (m, n)."""
        return torch.cat([V @ block.T for _, block in self.rows.blocks()], dim=1)

    def __matmul__(self, right: Rows) -> Tensor:
        """G.T @ H for another matrix H with as many rows, of shape (n, k): a sum over blocks, shape (d, k)."""
        product = 0
        for rows, block in self.rows.blocks():
            same_rows = block if right is self.rows else right.read(rows.start, rows.stop).to(block)
            product = product + block.T @ same_rows
        return product


def square_norms(G: Tensor | Rows) -> Tensor:
    """||g_i||^2 of every row of G (n, d), shape (n,)."""
    return G.square_norms if isinstance(G, Rows) else torch.linalg.vector_norm(G, dim=1).square()


def gram(G: Tensor | Rows, parts: int = 8) -> Tensor:
    """The lower triangle of K = G G^T, shape (n, n); what stands above the diagonal blocks is zero.

    Half the work of the full product, and all that a Cholesky factorization reads.
    """
    if isinstance(G, Rows) and G.is_one_block:
        G = G.tensor()
    size = math.ceil(len(G) / parts)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        if isinstance(G, Rows):
            yield from G.blocks()
        else:
            yield from ((slice(start, start + size), G[start : start + size]) for start in range(0, len(G), size))

    K = torch.zeros(len(G), len(G), device=G.device, dtype=G.dtype)
    for rows, block in blocks():
        for columns, other in blocks():
            K[rows, columns] = block @ other.T
            if columns == rows:
                break
    return K
