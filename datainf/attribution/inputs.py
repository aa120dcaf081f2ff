"""The gradients that scores are made of: their layers' rows, and what can be wrong with them."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from datainf.attribution.kronecker import Factors
from datainf.attribution.methods import Method, name_of, takes
from datainf.errors import InputError
from datainf.storage.rows import Rows, Scratch


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


class OneLayer(Mapping[str, Tensor]):
    """All layers of some gradients side by side, as one layer of D parameters, read in blocks."""

    NAME = "all layers"

    def __init__(self, gradients: Mapping[str, Tensor]):
        self._rows = Rows.beside([layer_rows(gradients, name) for name in gradients])

    def rows(self, name: str) -> Rows:
        """The lazy (n, D) matrix, with a scratch of its own: a block of one stays while another's are read."""
        return self._rows.to(scratch=Scratch())

    def __getitem__(self, name: str) -> Tensor:
        if name != self.NAME:
            raise KeyError(name)
        return self._rows.tensor()

    def __iter__(self) -> Iterator[str]:
        return iter([self.NAME])

    def __len__(self) -> int:
        return 1


def told(
    gradients: Mapping[str, Tensor], method: Method, factors: Mapping[str, Factors] | None
) -> dict[str, dict[str, object]]:
    """Layer name -> what a method is told of it beside its gradients: its ``shape`` (out, in), its ``factors``.

    Raises:
        InputError: it is not known of a layer, or the factors are of another shape.
    """
    found: dict[str, dict[str, object]] = {name: {} for name in gradients}
    if takes(method, "shape"):
        shapes = getattr(gradients, "shapes", {})
        if missing := [name for name in gradients if name not in shapes]:
            raise InputError(
                f"{name_of(method)} must know which matrix layer {missing[0]!r} is of: give a GradientStore with "
                "shapes=, as per_sample_gradients makes it."
            )
        found = {name: {"shape": shapes[name]} for name in gradients}
    if takes(method, "factors"):
        if missing := [name for name in gradients if name not in (factors or {})]:
            raise InputError(
                f"{name_of(method)} must know the factors of layer {missing[0]!r}: give factors=, as kronecker_factors "
                "makes them of the model and the training examples."
            )
        for name, told_of in found.items():
            sides = tuple(len(side) for side in factors[name])
            if sides != tuple(told_of["shape"]):
                raise InputError(f"The factors of layer {name!r} are of a matrix {sides}, not {told_of['shape']}.")
            told_of["factors"] = factors[name]
    return found


def check_device(device: torch.device | str | None) -> None:
    """Refuse, as an InputError, a device that torch does not find here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f'The device {device!r} cannot be used here: give one such as "cpu" or "cuda".') from error


def check_products(train: Mapping[str, Tensor], ihvp: Mapping[str, Tensor]) -> None:
    """Refuse inverse-Hessian-vector products of layers that the training gradients do not have, or not so wide."""
    if not train:
        raise ValueError("There are no layers: the training gradients are an empty mapping.")
    for name, R in ihvp.items():
        if name not in train:
            raise ValueError(f"Layer {name!r} of `ihvp` is missing from the training gradients.")
        n, d = layer_rows(train, name).shape
        if R.ndim != 2 or R.shape[1] != d:
            raise ValueError(f"Layer {name!r} has shape {(n, d)} in train and {tuple(R.shape)} in ihvp: d_l differs.")
        if n == 0:
            raise ValueError(f"There are no training examples: layer {name!r} has no rows.")


def check_pair(train: Mapping[str, Tensor], query: Mapping[str, Tensor], side: str = "query") -> None:
    """Refuse gradients that cannot be compared: other layers, other widths, no examples."""
    if not train:
        raise ValueError("There are no layers: the training gradients are an empty mapping.")
    if missing := sorted(set(train) ^ set(query)):
        name = missing[0]
        raise ValueError(
            f"Train and {side} gradients must be of the same layers, but {len(missing)} are in one alone: "
            f"layer {name!r} is missing from the {side if name in train else 'training'} gradients."
        )
    n_of = {}
    for name in train:
        shapes = [tuple(layer_rows(side, name).shape) for side in (train, query)]
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1]:
            raise ValueError(
                f"Layer {name!r} has shape {shapes[0]} in train and {shapes[1]} in {side}; "
                "both must be (examples, d_l) with the same d_l."
            )
        for which, (examples, _) in zip(("training", side), shapes, strict=True):
            if examples == 0:
                raise ValueError(f"There are no {which} examples: layer {name!r} has no rows.")
            if n_of.setdefault(which, examples) != examples:
                raise ValueError(f"Layer {name!r} has {examples} {which} rows where the others have {n_of[which]}.")


def check_finite(side: str, name: str, squares: Float[Tensor, " n"], first: int = 0) -> None:
    """Refuse gradients that are not finite, naming the first such example; `squares` are the squared norms of those
    from number `first` on."""
    bad = (~torch.isfinite(squares)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"The gradient of {side} example {first + bad[0].item()} in layer {name!r} is not finite "
            f"({len(bad)} of {len(squares)} examples): look at that example's loss, or drop it."
        )
