"""The layers whose gradients the study takes, and the gradient of each row of a batch in one of them.

A *layer* is one weight matrix, named as in ``model.named_parameters()``: lora_A and lora_B of an adapted module are
two, the weight of a trained head is one more. A convolution's kernel counts as the matrix that acts on its patches.
**Biases are left out**, as in the paper's experiments: they are not part of any layer here, though they may well have
been trained.
"""

import re
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

Layers = str | Collection[str] | None
"""Which layers: all trainable weights (None), those whose name a regular expression finds, or these names."""


def trainable_layers(model: nn.Module, layers: Layers = None) -> dict[str, nn.Linear | nn.Conv2d]:
    """Layer name -> the module whose weight it is, for every trainable Linear or Conv2d weight that `layers` admits.

    Raises:
        ValueError: there are none, a name in `layers` is not among them, the adapter's weights act other than through
            their modules (DoRA), or a convolution is not a matrix on its patches (groups, padding other than zeros).
    """
    modules = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.requires_grad
    }
    if not modules:
        raise ValueError(
            "The model has no trainable Linear or Conv2d weight: attach an adapter, and load a saved one with "
            "is_trainable=True."
        )
    if any(any(getattr(module, "use_dora", {}).values()) for module in model.modules() if _is_tuner(module)):
        raise ValueError("DoRA adapters are not supported: their weights act other than through their own modules.")
    chosen = _chosen(modules, layers)
    for name, module in chosen.items():
        if isinstance(module, nn.Conv2d) and not _acts_on_patches(module):
            raise ValueError(
                f"The convolution {name!r} is not supported: it must have one group and numbers of zeros as its "
                "padding. Leave it out by `layers`."
            )
    return chosen


def _chosen(modules: dict[str, nn.Module], layers: Layers) -> dict[str, nn.Module]:
    """The modules that `layers` admits."""
    if layers is None:
        return modules
    if isinstance(layers, str):
        chosen = {name: module for name, module in modules.items() if re.search(layers, name)}
    else:
        if unknown := [name for name in layers if name not in modules]:
            raise ValueError(f"No trainable weight is called {unknown[0]!r}; there is {next(iter(modules))!r}.")
        chosen = {name: modules[name] for name in layers}
    if not chosen:
        raise ValueError(
            f"layers={layers!r} matches none of the {len(modules)} layers, such as {next(iter(modules))!r}."
        )
    return chosen


def _is_tuner(module: nn.Module) -> bool:
    return isinstance(getattr(module, "use_dora", None), Mapping)


def _acts_on_patches(module: nn.Conv2d) -> bool:
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def row_gradients(module: nn.Linear | nn.Conv2d, inputs: Tensor, output_gradient: Tensor, rows: int) -> Tensor:
    """The gradients of the weight for each of `rows` equal parts of a batch: (rows, weight.numel()).

    A batch of more than `rows` items is cut into as many runs of neighbours, and every run's gradients are summed.

    Args:
        inputs, output_gradient: what went into the module, and the loss's gradient of what came out.
    """
    if isinstance(module, nn.Conv2d):
        inputs, output_gradient = _patches(module, inputs), output_gradient.flatten(2).mT
    return contract(inputs, output_gradient, rows)


def contract(inputs: Tensor, output_gradient: Tensor, rows: int) -> Float[Tensor, "rows out*in"]:
    """Sum over tokens t of (dloss/dy_t) x_t^T, for each of `rows` equal parts: (b, ..., in), (b, ..., out)."""
    at_least_float32 = torch.promote_types(inputs.dtype, torch.float32)
    x = inputs.reshape(rows, -1, inputs.shape[-1]).to(at_least_float32)
    dy = output_gradient.reshape(rows, -1, output_gradient.shape[-1]).to(at_least_float32)
    return torch.einsum("rto,rti->roi", dy, x).flatten(1)


def _patches(module: nn.Conv2d, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b places c*kernel"]:
    """What the kernel sees at each place: a convolution is a Linear layer on these."""
    shape = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
    return nn.functional.unfold(images, module.kernel_size, **shape).mT
