"""A matrix of gradients seen through blocks, so that it need not fit in memory.

The influence methods are written as matrix equations in G of shape (n, d). `Rows` gives them those products (`V @ G.T`,
`C @ G`, `G @ X`, `second_moment`, `gram`, the squared row norms) while holding one block of rows or columns at a time,
so the same line of code reads as its equation for a tensor in memory and for a layer that lives on disk.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_BYTES = 256 * 2**20
PART = 1 / 16  # of a block, and one row at least, is read at a time where it cannot be read into its place
ALL = slice(None)


class Scratch:
    """Memory for one block at a time, and which block it holds.

    Fresh memory costs more than filling it, so a block is written over the one before; and a block that is asked for
    twice in a row is read once. Several `Rows` may share one scratch, of layer after layer.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._holds: tuple | None = None

    def shrink(self, limit: int) -> None:
        """Give the memory back if it is more than `limit` bytes."""
        if len(self._bytes) > limit:
            self._bytes, self._holds = torch.empty(0, dtype=torch.uint8), None

    def block(
        self, key: tuple, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fill: Callable, limit: int
    ) -> Tensor:
        """The block called `key`, which is valid until the next call: ``fill(out)`` unless it is held already.

        No more than `limit` bytes are kept, or what this block takes.
        """
        size = shape[0] * shape[1] * dtype.itemsize
        if self._bytes.device != device or not size <= len(self._bytes) <= max(size, limit):
            self._bytes = self._holds = None  # first, so that old and new are never held together
            self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        out = self._bytes[:size].view(dtype).view(shape)
        if self._holds != key:
            self._holds = None
            fill(out)
            self._holds = key
        return out


Fill = Callable[[Tensor, slice, slice], object]
"""``fill(out, rows, columns)`` writes those rows and columns into `out`, of whatever type and device it is."""


class Rows:
    """A lazy (n, d) matrix, read in blocks.

    Args:
        fill: how a part of the matrix is read; see `Fill`. It may hold `PART` of what it writes besides.
        shape: (n, d).
        device, dtype: where and in which type each block is handed to the products.
        block_bytes: the most bytes that one block may take on ``device``, what `fill` holds included.
        square_norms: ||g_i||^2 of every row, shape (n,), where known.
        whole: the matrix, if it is in memory. While its device and type are asked for, it is the one block, which takes
            no further memory.
        scratch: where blocks are held, if it is to be shared with others.
    """

    def __init__(
        self,
        fill: Fill,
        shape: tuple[int, int],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        block_bytes: int = BLOCK_BYTES,
        square_norms: Tensor | None = None,
        whole: Tensor | None = None,
        scratch: Scratch | None = None,
    ):
        self.fill, self.shape, self.dtype = fill, tuple(shape), dtype
        self.device = torch.empty(0, device=device).device  # with its index: "cuda" becomes "cuda:0"
        self.block_bytes, self.whole, self.scratch = block_bytes, whole, scratch or Scratch()
        self._known_square_norms = square_norms

    @classmethod
    def of(cls, tensor: Tensor, **options) -> "Rows":
        """The rows of a tensor that is in memory; a block is a view where neither device nor type changes."""
        options = {"device": tensor.device, "dtype": tensor.dtype} | options
        fill = lambda out, rows, columns: convert(tensor[rows, columns], out)  # noqa: E731
        return cls(fill, tuple(tensor.shape), whole=tensor, **options)

    @classmethod
    def beside(cls, parts: Sequence["Rows"]) -> "Rows":
        """The same examples' rows of several matrices side by side, shape (n, the sum of their d)."""
        first = parts[0]
        edges = list(accumulate((part.shape[1] for part in parts), initial=0))

        def fill(out: Tensor, rows: slice, columns: slice) -> None:
            start, stop, _ = columns.indices(edges[-1])
            for part, left, right in zip(parts, edges, edges[1:], strict=False):
                here = slice(max(start, left), min(stop, right))
                if here.start < here.stop:
                    place = out[:, here.start - start : here.stop - start]
                    part.fill(place, rows, slice(here.start - left, here.stop - left))

        squares = sum(part.square_norms for part in parts)
        like = {"device": first.device, "dtype": first.dtype, "block_bytes": first.block_bytes}
        return cls(fill, (len(first), edges[-1]), square_norms=squares, **like)

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, **changes) -> "Rows":
        """The same rows with another device, dtype, block_bytes or scratch."""
        keep = {name: getattr(self, name) for name in ("device", "dtype", "block_bytes", "whole", "scratch")}
        return Rows(self.fill, self.shape, square_norms=self._known_square_norms, **keep | changes)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of row numbers, block of rows on ``device`` in ``dtype``), in order; each until the next."""
        yield from ((rows, self._block(rows, ALL)) for rows in slices(len(self), self._fit(self.shape[1])))

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of column numbers, block of columns), in order; each until the next."""
        yield from ((columns, self._block(ALL, columns)) for columns in slices(self.shape[1], self._fit(len(self))))

    def tensor(self, rows: slice = ALL) -> Tensor:
        """All rows or a slice of them: a tensor of their own or, where nothing changes, part of the one in memory."""
        if self.is_at_hand:
            return self.whole[rows]
        start, stop, _ = rows.indices(len(self))
        out = torch.empty(stop - start, self.shape[1], device=self.device, dtype=self.dtype)
        self.fill(out, rows, ALL)
        return out

    @property
    def is_at_hand(self) -> bool:
        """Whether it is in memory as it is asked for, so that blocks of it take no memory of their own."""
        return self.whole is not None and (self.whole.device, self.whole.dtype) == (self.device, self.dtype)

    def _fit(self, length: int) -> int:
        """How many rows (or columns) of `length` entries fit in a block; at least one."""
        if self.is_at_hand:
            return max(1, *self.shape)
        line = max(1, length * self.dtype.itemsize)
        # Beside the block a part of it is held while it is read, and that is a whole line at least.
        return max(1, min(int(self.block_bytes / (1 + PART)) // line, self.block_bytes // line - 1))

    def _block(self, rows: slice, columns: slice) -> Tensor:
        if self.is_at_hand:
            return self.whole[rows, columns]
        rows, columns = slice(*rows.indices(self.shape[0])), slice(*columns.indices(self.shape[1]))
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        # By the function that reads, not by this object: what `to()` gives is of the same matrix.
        key = (self.fill, rows.start, rows.stop, columns.start, columns.stop, self.dtype)
        fill = lambda out: self.fill(out, rows, columns)  # noqa: E731
        return self.scratch.block(key, shape, self.dtype, self.device, fill, self.block_bytes)

    @cached_property
    def square_norms(self) -> Tensor:
        """||g_i||^2 of every row, shape (n,)."""
        if self._known_square_norms is not None:
            return self._known_square_norms.to(self.device, self.dtype)
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

    def __matmul__(self, X: Tensor) -> Tensor:
        """G @ X for X of shape (d, k): block by block, shape (n, k)."""
        return torch.cat([block @ X for _, block in self.blocks()])

    # Without this, torch would try to read a Rows on the right of `@` as a tensor instead of calling __rmatmul__.
    __torch_function__ = classmethod(lambda cls, *args, **kwargs: NotImplemented)


class _Columns:
    """The transpose of a `Rows`, of shape (d, n): only ever a factor in a product."""

    __torch_function__ = classmethod(lambda cls, *args, **kwargs: NotImplemented)

    def __init__(self, rows: Rows):
        self.rows, self.shape, self.device, self.dtype = rows, rows.shape[::-1], rows.device, rows.dtype

    def __rmatmul__(self, V: Tensor) -> Tensor:
        """V @ G.T for V of shape (m, d), shape (m, n)."""
        return torch.cat([V @ block.T for _, block in self.rows.blocks()], dim=1)

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return ((rows, block.T) for rows, block in self.rows.blocks())


Matrix = Float[Tensor, "n d"] | Rows


def convert(rows: Tensor, out: Tensor) -> None:
    """Write rows into `out`; to another device in their own type, often the narrower one, and a few at a time.

    To a GPU by way of page-locked memory: while one part is on its way, the next is made ready.
    """
    if rows.device == out.device:
        out.copy_(rows)
        return
    for some in slices(len(rows), max(1, int(len(rows) * PART))):
        part = rows[some].pin_memory() if out.is_cuda else rows[some]
        out[some].copy_(part.to(out.device, non_blocking=True))


def double_on(device: torch.device) -> torch.device:
    """Where to compute in float64 what is on `device`: there, or on the CPU if it has no float64, as Apple's GPUs."""
    return torch.device("cpu") if device.type == "mps" else device


def double(M: Matrix) -> Matrix:
    """M in float64, on the CPU if its device has none."""
    return M.to(device=double_on(M.device)).to(dtype=torch.float64)


def square_norms(G: Matrix) -> Float[Tensor, " n"]:
    """||g_i||^2 of every row of G."""
    return G.square_norms if isinstance(G, Rows) else torch.linalg.vector_norm(G, dim=1).square()


def second_moment(
    G: Matrix, R: Float[Tensor, "m d"], weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "m d"]:
    """((R G^T) diag(weights) G) / n, that is sum_i w_i g_i g_i^T / n times every row of R; the weights are 1 if None.

    One pass over G: each block enters both products while it is at hand. The d x d matrix is never formed.
    """
    factor = torch.full((len(G),), 1 / len(G), device=R.device, dtype=R.dtype) if weights is None else weights / len(G)
    product = torch.empty_like(R)
    for rows, block in G.blocks() if isinstance(G, Rows) else [(slice(0, len(G)), G)]:
        product.addmm_((R @ block.T).mul_(factor[rows]), block, beta=0 if rows.start == 0 else 1)
    return product


def gram(M: Matrix | _Columns, parts: int = 8) -> Float[Tensor, "k k"]:
    """The lower triangle of M M^T, shape (k, k) for M of k rows; what stands above the diagonal parts is zero.

    Half the work of the full product, and all that a Cholesky factorization reads; one pass over M.
    """
    product = torch.zeros(M.shape[0], M.shape[0], device=M.device, dtype=M.dtype)
    for _, block in [(ALL, M)] if isinstance(M, Tensor) else M.column_blocks():
        for rows in slices(len(product), -(-len(product) // parts)):
            product[rows, : rows.stop].addmm_(block[rows], block[: rows.stop].T)
    return product


def slices(length: int, size: int) -> Iterator[slice]:
    """0..length-1 in runs of at most `size`."""
    return (slice(start, min(length, start + size)) for start in range(0, length, size))
