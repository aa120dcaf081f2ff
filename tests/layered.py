"""Gradients of three layers, made up, in memory or to be read."""

import torch

from datainf.storage.rows import Rows

SHAPES = {40: (4, 10), 12: (4, 3), 7: (1, 7), 30: (5, 6), 5: (5, 1), 21: (3, 7)}  # d -> the matrix that it is of


def gradients(n: int, d: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Gradients with a decaying spectrum, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -0.7
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale).to(dtype)


def factors_of(shape: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """What EK-FAC wants of a layer, made up."""
    return tuple(gradients(3 * size, size, seed=size).T @ gradients(3 * size, size, seed=size) for size in shape)


class Layers(dict):
    """Gradients that know of which matrices they are."""

    shapes = {"a": SHAPES[40], "b": SHAPES[5], "c": SHAPES[21]}


FACTORS = {name: factors_of(shape) for name, shape in Layers.shapes.items()}


def pair(n=9, m=4, dtype=torch.float64):
    widths = {"a": 40, "b": 5, "c": 21}
    train = {name: gradients(n, d, seed=index, dtype=dtype) for index, (name, d) in enumerate(widths.items())}
    query = {name: gradients(m, d, seed=10 + index, dtype=dtype) for index, (name, d) in enumerate(widths.items())}
    return Layers(train), Layers(query)


class Streamed(Layers):
    """Gradients that are read, as those on disk are: a block of a few rows is held in memory of its own."""

    def rows(self, name):
        G = self[name]
        fill = lambda out, rows, columns: out.copy_(G[rows, columns])  # noqa: E731
        return Rows(fill, G.shape, device="cpu", dtype=G.dtype, block_bytes=4 * G.shape[1] * G.dtype.itemsize)
