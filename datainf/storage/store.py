"""Per-sample gradients of n examples, in memory or on disk: `GradientStore`. What lies on disk are its `shards`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from datainf.storage.files import place
from datainf.storage.rows import Rows, double_on
from datainf.storage.shards import MANIFEST, SHARD_BYTES, Shards


class GradientStore(Mapping[str, Tensor]):
    """A mapping from layer name to the per-sample gradients of that layer, a Tensor of shape (n, d_l).

    Made by `per_sample_gradients`, by ``GradientStore({name: tensor, ...})``, or by `GradientStore.load`.
    From a store on disk ``store[name]`` reads a whole layer into memory; `rows` reads it block by block.

    Attributes:
        skipped: the numbers of the examples that were left out of the dataset, and have no row.
        shapes: layer name -> (out, in), the matrix that its d_l numbers make up row by row, where that is known. In
            memory a layer may be given in its shape, (n, out, in).
    """

    def __init__(
        self,
        layers: Mapping[str, Tensor],
        skipped: Sequence[int] = (),
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ):
        lengths = {len(gradients) for gradients in layers.values()}
        if not layers or 0 in lengths:
            raise ValueError(f"A store holds one {'example' if layers else 'layer'} at least; there is none.")
        if len(lengths) != 1:
            raise ValueError(f"All layers of a store must have the same number of rows, not {sorted(lengths)}.")
        self._layers = dict(layers)
        self._widths = {name: gradients[0].numel() for name, gradients in layers.items()}
        self.shapes = {name: matrix_shape(each.shape[1:]) for name, each in layers.items() if each.dim() > 2}
        self.shapes |= shapes or {}
        self.n = lengths.pop()
        self.dtype = next(iter(layers.values())).dtype
        self.folder: Path | None = None
        self.skipped = tuple(skipped)

    @classmethod
    def load(cls, folder: str | Path) -> "GradientStore":
        """Open the store in `folder`; nothing but its manifest is read until a layer is asked for.

        Raises:
            FileNotFoundError: there is no store in `folder`, or shards are missing (an extraction was cut short).
            OSError: a shard cannot be read or is of another store. (`verify` looks at every byte.)
        """
        folder = place(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"There is no gradient store in {folder}: it holds no {MANIFEST}.")
        shards = Shards.open(folder)
        if missing := shards.missing():
            raise FileNotFoundError(
                f"The gradient store in {folder} is not complete: {len(missing)} of {len(shards)} shards are missing. "
                "Call per_sample_gradients again with store= this folder to finish it."
            )
        for index in range(len(shards)):
            shards.check(index)
        store = cls.__new__(cls)
        store._layers, store._widths = None, shards.widths
        store.n, store.dtype, store.folder, store._shards = shards.n, shards.dtype, folder, shards
        store.shapes = shards.shapes
        store.skipped = tuple(map(int, filter(None, shards.manifest["identity"].get("skipped", "").split(", "))))
        return store

    def save(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> "GradientStore":
        """Write the store to `folder` and return it as opened from there.

        Raises:
            FileExistsError: `folder` holds a store already.
        """
        if (place(folder) / MANIFEST).exists() and not Shards.open(folder).missing():
            raise FileExistsError(f"{folder} holds a gradient store already: choose another folder or delete it.")
        about = {"skipped": ", ".join(map(str, self.skipped))}
        options = {"shard_bytes": shard_bytes, "identity": about, "shapes": self.shapes}
        shards = Shards.create(folder, self.n, self._widths, self.dtype, **options)
        for index in shards.missing():
            shards.write(index, {name: self.rows(name).tensor(slice(*shards.bounds(index))) for name in self})
        return self.load(folder)

    def verify(self) -> None:
        """Read a store on disk through, comparing every shard with its checksum; nothing to do in memory.

        Raises:
            OSError: a shard is damaged; names it and says what to do.
        """
        for index in range(len(self._shards) if self.folder else 0):
            self._shards.check(index, every_byte=True)

    def rows(self, name: str) -> Rows:
        """The gradients of one layer as a lazy (n, d_l) matrix."""
        if self._layers is not None:
            return Rows.of(self[name])
        fill, shape = partial(self._shards.fill, name), (self.n, self._widths[name])
        return Rows(fill, shape, device="cpu", dtype=self.dtype, square_norms=self._shards.square_norms[name])

    def mean(self) -> "GradientStore":
        """The mean gradient of every layer, as a store of one example: the gradient of the mean loss."""
        return GradientStore({name: self._mean_of(self.rows(name)) for name in self}, shapes=self.shapes)

    def mean_of_parts(self, parts: int) -> "GradientStore":
        """The mean over so many parts that stand side by side, as `concatenate` puts an example's rows, in memory: the
        gradients of the rows' mean loss."""
        layers = {
            name: torch.cat([block.unflatten(1, (parts, -1)).mean(dim=1) for _, block in self.rows(name).blocks()])
            for name in self
        }
        shapes = {name: (out // parts, width) for name, (out, width) in self.shapes.items()}
        return GradientStore(layers, self.skipped, shapes)

    def _mean_of(self, G: Rows) -> Tensor:
        """Of a layer's rows, shape (1, d_l)."""
        total = sum(block.to(double_on(G.device)).sum(dim=0, dtype=torch.float64) for _, block in G.blocks())
        return (total / self.n).to(torch.promote_types(self.dtype, torch.float32)).to(G.device).unsqueeze(0)

    @property
    def nbytes(self) -> int:
        """Bytes that the gradients take, in memory or on disk."""
        return self.n * sum(self._widths.values()) * self.dtype.itemsize

    def __getitem__(self, name: str) -> Tensor:
        if self._layers is not None:
            return self._layers[name].flatten(1)
        if name not in self._widths:
            raise KeyError(name)
        return self.rows(name).tensor()

    def __contains__(self, name: object) -> bool:
        return name in self._widths  # a Mapping would read the layer to see whether it is there

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __repr__(self) -> str:
        where = f"in folder {self.folder.name}" if self.folder else "in memory"
        size = f"{self.n} examples, {len(self)} layers, {sum(self._widths.values()):,} parameters"
        return f"GradientStore({size}, {self.nbytes / 2**20:.1f} MiB {where})"


def matrix_shape(shape: Sequence[int], parts: int = 1) -> tuple[int, int]:
    """(out, in) of a weight of any shape: its first dimension and all others; `parts` of them one under the other."""
    return parts * shape[0], math.prod(shape[1:])
