"""The files of a gradient store: consecutive examples, cut into shards that are written whole or not at all.

A store is a folder with ``manifest.json`` (what the gradients are of, and how they are cut) and one safetensors file
per shard of consecutive examples. A shard is written aside and renamed, so a file with a shard's name is whole, however
the writing ended; extraction resumes from the shards that are there. Each shard says of which store it is, holds the
squared norms of its gradients beside them, and has a checksum.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datainf.storage.files import fill_whole, place, remove_stale, write_whole
from datainf.storage.rows import PART, slices

MANIFEST = "manifest.json"
FORMAT = 3
SHARD_BYTES = 256 * 2**20
# The name in a shard of the (rows, L) squared norms; no layer is called so.
SQUARE_NORMS = "||g||^2"
# The name in a shard's metadata of what it is: JSON.
ABOUT = "datainf"


class Shards:
    """The files of a store on disk: consecutive examples, written whole or not at all."""

    def __init__(self, folder: Path, manifest: Mapping):
        self.folder, self.manifest = folder, manifest
        self.n, self.widths, self.shard_rows = manifest["n"], manifest["layers"], manifest["shard_rows"]
        self.shapes = {name: tuple(shape) for name, shape in manifest.get("shapes", {}).items()}
        self.dtype = getattr(torch, manifest["dtype"])
        self.digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
        self._headers: dict[int, tuple[int, dict]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "Shards":
        """The store that is in `folder`, complete or not.

        Raises:
            ValueError: it is of another version of the format.
        """
        folder = place(folder)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"The gradient store in {folder} is of another version of this package (format "
                f"{manifest.get('format')}, not {FORMAT}): delete it and call per_sample_gradients again."
            )
        return cls(folder, manifest)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        n: int,
        widths: Mapping[str, int],
        dtype: torch.dtype,
        *,
        shard_bytes: int = SHARD_BYTES,
        shard_rows: int | None = None,
        least_rows: int = 1,
        identity: Mapping[str, str] | None = None,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> "Shards":
        """Begin a store in `folder`, or go on with the one that is there if it is of the same gradients.

        `identity` says what the gradients are of (the model, the data, the loss), in short strings; `shapes` what
        matrix each layer's d_l numbers make up, as `GradientStore.shapes`. A shard has
        `shard_rows` examples; if none are given, as many as the shards that are there, or as make up `shard_bytes`, but
        not fewer than `least_rows`. A store in which no shard was written yet is begun anew.

        Raises:
            ValueError: `folder` holds gradients of something else; the message says what differs.
        """
        folder = place(folder)
        row_bytes = max(1, sum(widths.values()) * dtype.itemsize)
        manifest = {
            "format": FORMAT,
            "n": n,
            "layers": dict(widths),
            "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
            "dtype": str(dtype).removeprefix("torch."),
            "shard_rows": min(n, shard_rows or max(1, least_rows, shard_bytes // row_bytes)),
            "identity": dict(identity or {}),
        }
        begun = (folder / MANIFEST).exists() and any(folder.glob("shard-*"))
        if begun:
            found = cls.open(folder).manifest
            if shard_rows is None:
                manifest["shard_rows"] = found["shard_rows"]
            # Of the shapes an earlier version said nothing; the widths are compared.
            before, now = ({**facts, **facts["identity"], "identity": 0, "shapes": 0} for facts in (found, manifest))
            differs = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if differs:
                raise ValueError(
                    f"{folder} holds gradients of something else (differs in: {', '.join(differs)}): "
                    "choose another folder or delete this one."
                )
            manifest = found
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
        remove_stale(folder)
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
        tensors = {name: gradients[name].to("cpu", self.dtype).contiguous() for name in self.widths}
        tensors[SQUARE_NORMS] = torch.stack([self._square_norms_of(tensors[name]) for name in self.widths], dim=1)
        about = {"store": self.digest, "index": str(index), "checksum": _checksum(tensors)}
        # In one entry, since several are written in an order that differs from file to file.
        metadata = {ABOUT: json.dumps(about)}
        fill_whole(self.path(index), lambda path: save_file(tensors, path, metadata=metadata))

    def _square_norms_of(self, G: Tensor) -> Tensor:
        # Of the gradients as they are stored, so that whoever computes them from the store finds the same.
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.linalg.vector_norm(G, dim=1, dtype=dtype).square()

    @cached_property
    def square_norms(self) -> dict[str, Tensor]:
        """Layer name -> ||g_i||^2 of every example, shape (n,)."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        table = torch.empty(self.n, len(self.widths), dtype=dtype)
        for index in range(len(self)):
            first, last = self.bounds(index)
            self._read(index, SQUARE_NORMS, first, slice(None), table[first:last])
        return {name: table[:, column] for column, name in enumerate(self.widths)}

    def check(self, index: int, every_byte: bool = False) -> None:
        """Refuse a shard that cannot be read or is not of this store; with `every_byte`, one that was changed.

        Raises:
            OSError: names the shard and says what to do.
        """
        with self._opened(index) as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            if about.get("store") != self.digest or about.get("index") != str(index):
                raise OSError(
                    self._refusal(index, "is another shard, or of another store (another model, data, loss or layers)")
                )
            if every_byte and _checksum({name: file.get_tensor(name) for name in file.keys()}) != about["checksum"]:
                raise OSError(self._refusal(index, "is damaged (its checksum differs)"))

    def _refusal(self, index: int, what: str) -> str:
        again = "delete it and call per_sample_gradients again with store= its folder to make it anew."
        return f"Shard {self.path(index)} {what}: {again}"

    def fill(self, name: str, out: Tensor, rows: slice, columns: slice) -> None:
        """Write those rows and columns of one layer into `out`, of any type and device.

        What is read is read into its place where it fits as it is, and a few rows at a time where not. (The slices of
        safetensors map the whole file, which makes it hard to say what is held.)
        """
        start, stop, _ = rows.indices(self.n)
        some = max(1, int((stop - start) * PART))
        as_it_is = out.device.type == "cpu" and out.dtype == self.dtype and out.is_contiguous()
        for index in range(start // self.shard_rows, math.ceil(stop / self.shard_rows)):
            first, last = max(start, self.bounds(index)[0]), min(stop, self.bounds(index)[1])
            if as_it_is:
                self._read(index, name, first, columns, out[first - start : last - start])
                continue
            for part in slices(last - first, some):
                at = first - start + part.start
                place = out[at : at + part.stop - part.start]
                read = torch.empty(place.shape, dtype=self.dtype)
                self._read(index, name, first + part.start, columns, read)
                place.copy_(read.to(place.device))

    def _read(self, index: int, name: str, first: int, columns: slice, out: Tensor) -> None:
        """Read rows from number `first` of the store on into `out`, which is contiguous and of their type."""
        begin, width = self._place_of(index, name)
        left, right, _ = columns.indices(width)
        size = out.dtype.itemsize
        begin += (first - self.bounds(index)[0]) * width * size
        raw = memoryview(out.view(torch.uint8).numpy()).cast("B")
        # Rows that are whole lie one after another; of others each has its place.
        run = len(raw) if right - left == width else (right - left) * size
        with open(self.path(index), "rb", buffering=0) as file:
            for row, place in enumerate(range(0, len(raw), run)):
                file.seek(begin + (row * width + left) * size)
                unread = raw[place : place + run]
                while unread:
                    count = file.readinto(unread)
                    if not count:
                        raise OSError(self._refusal(index, "ends before its gradients do"))
                    unread = unread[count:]

    def _place_of(self, index: int, name: str) -> tuple[int, int]:
        """Where in a shard's file a layer begins, and how many numbers a row of it has."""
        if index not in self._headers:
            # As the format has it: the header's length in 8 bytes, the header in JSON, the tensors.
            with open(self.path(index), "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._headers[index] = 8 + length, json.loads(file.read(length))
        begin, header = self._headers[index]
        return begin + header[name]["data_offsets"][0], header[name]["shape"][1]

    @contextmanager
    def _opened(self, index: int) -> Iterator[safe_open]:
        try:
            with safe_open(self.path(index), framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise OSError(self._refusal(index, f"cannot be read ({error})")) from error


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of the names and bytes of all tensors."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"
