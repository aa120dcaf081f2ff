"""Per-sample gradients of n examples, in memory or on disk.

On disk a store is a folder with ``manifest.json`` (what the gradients are of, and how they are cut) and one
safetensors file per shard of consecutive examples. A shard is written aside and renamed, so a file with a shard's
name is whole, however the writing ended; extraction resumes from the shards that are there.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datainf.files import fill_whole, write_whole
from datainf.rows import Rows

MANIFEST = "manifest.json"
SHARD_BYTES = 256 * 2**20


class GradientStore(Mapping[str, Tensor]):
    """A mapping from layer name to the per-sample gradients of that layer, a Tensor of shape (n, d_l).

    Made by `per_sample_gradients`, by ``GradientStore({name: tensor, ...})``, or by `GradientStore.load`.
    From a store on disk ``store[name]`` reads a whole layer into memory; `rows` reads it block by block.
    """

    def __init__(self, layers: Mapping[str, Tensor]):
        lengths = {len(gradients) for gradients in layers.values()}
        if len(lengths) != 1:
            raise ValueError(f"All layers of a store must have the same number of rows, not {sorted(lengths)}.")
        self._layers = dict(layers)
        self._widths = {name: gradients[0].numel() for name, gradients in layers.items()}
        self.n = lengths.pop()
        self.dtype = next(iter(layers.values())).dtype
        self.folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "GradientStore":
        """Open the store in `folder`; nothing but its manifest is read until a layer is asked for.

        Raises:
            FileNotFoundError: there is no store in `folder`, or shards are missing (an extraction was cut short).
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"There is no gradient store in {folder}: it holds no {MANIFEST}.")
        shards = Shards.open(folder)
        if missing := shards.missing():
            raise FileNotFoundError(
                f"The gradient store in {folder} is not complete: {len(missing)} of {len(shards)} shards are missing. "
                "Call per_sample_gradients again with store= this folder to finish it."
            )
        store = cls.__new__(cls)
        store._layers, store._widths = None, shards.widths
        store.n, store.dtype, store.folder, store._shards = shards.n, shards.dtype, folder, shards
        return store

    def save(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> "GradientStore":
        """Write the store to `folder` and return it as opened from there.

        Raises:
            FileExistsError: `folder` holds a store already.
        """
        if (Path(folder) / MANIFEST).exists():
            raise FileExistsError(f"{folder} holds a gradient store already: choose another folder or delete it.")
        shards = Shards.create(folder, self.n, self._widths, self.dtype, shard_bytes=shard_bytes)
        for index in shards.missing():
            start, stop = shards.bounds(index)
            shards.write(index, {name: self.rows(name).read(start, stop) for name in self})
        return self.load(folder)

    def rows(self, name: str) -> Rows:
        """The gradients of one layer as a lazy (n, d_l) matrix."""
        if self._layers is not None:
            return Rows.of(self[name])
        read = self._shards.reader(name)
        return Rows(read, (self.n, self._widths[name]), device="cpu", dtype=self.dtype)

    def mean(self) -> "GradientStore":
        """The mean gradient of every layer, as a store of one example: the gradient of the mean loss."""
        return GradientStore(
            {
                name: sum(block.sum(dim=0, dtype=torch.float64) for _, block in self.rows(name).blocks())
                .div(self.n)
                .to(torch.promote_types(self.dtype, torch.float32))
                .unsqueeze(0)
                for name in self
            }
        )

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

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __repr__(self) -> str:
        where = f"in folder {self.folder.name}" if self.folder else "in memory"
        size = f"{self.n} examples, {len(self)} layers, {sum(self._widths.values()):,} parameters"
        return f"GradientStore({size}, {self.nbytes / 2**20:.1f} MiB {where})"


class Shards:
    """The files of a store on disk: consecutive examples, written whole or not at all."""

    def __init__(self, folder: Path, manifest: Mapping):
        self.folder, self.manifest = folder, manifest
        self.n, self.widths, self.shard_rows = manifest["n"], manifest["layers"], manifest["shard_rows"]
        self.dtype = getattr(torch, manifest["dtype"])

    @classmethod
    def open(cls, folder: str | Path) -> "Shards":
        return cls(Path(folder), json.loads((Path(folder) / MANIFEST).read_text(encoding="utf8")))

    @classmethod
    def create(
        cls,
        folder: str | Path,
        n: int,
        widths: Mapping[str, int],
        dtype: torch.dtype,
        *,
        shard_bytes: int = SHARD_BYTES,
        identity: Mapping[str, str] | None = None,
    ) -> "Shards":
        """Begin a store in `folder`, or go on with the one that is there if it is of the same gradients.

        `identity` says what the gradients are of (the model, the data, the loss), in short strings.

        Raises:
            ValueError: `folder` holds gradients of something else; the message says what differs.
        """
        folder = Path(folder)
        row_bytes = max(1, sum(widths.values()) * dtype.itemsize)
        manifest = {
            "format": 1,
            "n": n,
            "layers": dict(widths),
            "dtype": str(dtype).removeprefix("torch."),
            "shard_rows": max(1, min(n, shard_bytes // row_bytes)),
            "identity": dict(identity or {}),
        }
        if (folder / MANIFEST).exists():
            found = cls.open(folder).manifest
            before, now = ({**facts, **facts["identity"], "identity": None} for facts in (found, manifest))
            differs = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if differs:
                raise ValueError(
                    f"{folder} holds gradients of something else (differs in: {', '.join(differs)}): "
                    "choose another folder or delete this one."
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
        return cls(folder, manifest)

    def __len__(self) -> int:
        return math.ceil(self.n / self.shard_rows)

    def path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def bounds(self, index: int) -> tuple[int, int]:
        """The first example of a shard and the one after its last."""
        return index * self.shard_rows, min(self.n, (index + 1) * self.shard_rows)

    def missing(self) -> list[int]:
        """The shards that are yet to be written."""
        return [index for index in range(len(self)) if not self.path(index).exists()]

    def write(self, index: int, gradients: Mapping[str, Tensor]) -> None:
        """Write one shard: layer name -> (rows of the shard, d_l)."""
        tensors = {name: tensor.to(self.dtype).contiguous().cpu() for name, tensor in gradients.items()}
        fill_whole(self.path(index), lambda path: save_file(tensors, path))

    def reader(self, name: str):
        """``read(start, stop)`` for one layer: the rows of those examples, from as many shards as they span."""

        def read(start: int, stop: int) -> Tensor:
            parts = []
            for index in range(start // self.shard_rows, math.ceil(stop / self.shard_rows)):
                first, last = self.bounds(index)
                parts.append(self._read(index, name, max(start, first) - first, min(stop, last) - first))
            return torch.cat(parts)

        return read

    def _read(self, index: int, name: str, start: int, stop: int) -> Tensor:
        try:
            with safe_open(self.path(index), framework="pt") as file:
                return file.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"Shard {self.path(index)} cannot be read ({error}): delete it and call per_sample_gradients again "
                "with store= its folder to make it anew."
            ) from error
