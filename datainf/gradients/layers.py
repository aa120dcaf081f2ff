"""The layers whose gradients the study takes, the modules they act through, and the gradients of matrices.

A *layer* is one trainable weight, named as in ``model.named_parameters()``: lora_A and lora_B of an adapted module are
two, the weight of a trained head is one more, and so are embeddings, IA3's vectors, DoRA's magnitudes and the scales of
normalizations, where they are trainable. A convolution's kernel counts as the matrix that acts on its patches.
**Biases are left out**, as in the paper's experiments: they are not part of any layer here, though they may well have
been trained. A bias is a vector whose own name says so: ``bias``, ``in_proj_bias``, ``bias_ih_l0``.

Every layer has its *owner*, the module through whose forward it acts, on every row of the batch by itself. The owner of
a plain matrix is the Linear or Conv2d that holds it, and its gradients are outer products of what goes in and what
comes back (`row_gradients`). All others are left to `gradients.functional`.
"""

import re
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Layers = str | Collection[str] | None
"""Which layers: all trainable weights (None), those whose name a regular expression finds, or these names."""

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
"""Modules without a forward: what they hold acts through the module that holds them."""


def trainable_layers(model: nn.Module, layers: Layers = None) -> dict[str, nn.Parameter]:
    """Layer name -> its weight, for every trainable parameter but the biases that `layers` admits.

    A weight that several modules share is one layer, under the first of its names.

    Raises:
        ValueError: there are none, or a name in `layers` is not among them.
    """
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _is_bias(name, parameter)
    }
    if not weights:
        raise ValueError(
            "The model has no trainable weight: attach an adapter, and load a saved one with is_trainable=True."
        )
    return _chosen(weights, layers)


def _is_bias(name: str, parameter: nn.Parameter) -> bool:
    """Whether its own name says so and it is a vector: a table of biases, such as Swin's, is a layer."""
    words = name.rpartition(".")[2].split("_")
    return "bias" in words and sum(size > 1 for size in parameter.shape) <= 1


def _chosen(weights: dict[str, nn.Parameter], layers: Layers) -> dict[str, nn.Parameter]:
    """The weights that `layers` admits."""
    if layers is None:
        return weights
    if isinstance(layers, str):
        chosen = {name: weight for name, weight in weights.items() if re.search(layers, name)}
    else:
        if unknown := [name for name in layers if name not in weights]:
            raise ValueError(f"No trainable weight is called {unknown[0]!r}; there is {next(iter(weights))!r}.")
        # In the model's order, whatever the caller's: two processes, or two runs, are to agree on it.
        chosen = {name: weight for name, weight in weights.items() if name in set(layers)}
    if not chosen:
        raise ValueError(
            f"layers={layers!r} matches none of the {len(weights)} layers, such as {next(iter(weights))!r}."
        )
    return chosen


def check_adapters(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse layers of a PEFT adapter that takes no part in what the model computes, whose gradients would be zero.

    Raises:
        ValueError: the adapter is merged into the base, switched off, or not the active one; says how to change that.
    """
    adapters = set(getattr(model, "peft_config", ()))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in weights:
        parts = name.split(".")
        mine = next((part for part in reversed(parts) if part in adapters), None)
        for module in (modules.get(".".join(parts[:depth])) for depth in range(1, len(parts))):
            active = getattr(module, "active_adapters", None)
            if mine is None or not isinstance(active, list | tuple):
                continue
            if getattr(module, "disable_adapters", False) is True:
                raise ValueError(
                    f"The model's adapters are switched off, so layer {name!r} has no gradient: switch them on."
                )
            if mine in getattr(module, "merged_adapters", ()):
                raise ValueError(
                    f"Adapter {mine!r} is merged into the base, so layer {name!r} has no gradient: call "
                    "model.unmerge_adapter() first."
                )
            if mine not in active:
                raise ValueError(
                    f"Adapter {mine!r} is not active, so layer {name!r} has no gradient: activate it by "
                    "model.set_adapter(), or leave its layers out by layers=."
                )


def owners(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    """The modules through whose forward the layers act -> {a weight's name within the module: its layer's name}.

    A weight that several modules share has several owners, and its gradient is the sum over them.
    """
    layer_of = {weight: layer for layer, weight in weights.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, dict[str, str]] = {}
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in layer_of:
                owner = _owner(modules, path)
                within = ".".join(filter(None, [path, name])).removeprefix(f"{owner}.")
                found.setdefault(modules[owner], {})[within] = layer_of[parameter]
    return found


def _owner(modules: Mapping[str, nn.Module], path: str) -> str:
    """The path of the module through whose forward the parameters held at `path` act."""
    parts = path.split(".")
    for depth in range(len(parts)):
        ancestor = ".".join(parts[:depth])
        if _acts_as_a_whole(modules[ancestor]):
            return ancestor
    while isinstance(modules[path], CONTAINERS):
        path = path.rpartition(".")[0]
    return path


def _acts_as_a_whole(module: nn.Module) -> bool:
    """Whether its forward uses its parts' weights otherwise than by calling the parts on the batch.

    So do torch's attention, a parametrized module, and PEFT's layers with another adapter than plain LoRA, such as
    DoRA.
    """
    return (
        isinstance(module, nn.MultiheadAttention)
        or is_parametrized(module)
        or bool(getattr(module, "lora_variant", None))
    )


def is_matrix(module: nn.Module, names: Mapping[str, str]) -> bool:
    """Whether the owner's one layer is a matrix that acts on the tokens or the patches of its input: its forward is
    that of nn.Linear or nn.Conv2d, not one of a class's own."""
    if names.keys() != {"weight"} or is_parametrized(module):
        return False
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward and _acts_on_patches(module)


def _acts_on_patches(module: nn.Conv2d) -> bool:
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def row_gradients(module: nn.Linear | nn.Conv2d, inputs: Tensor, output_gradient: Tensor, rows: int) -> Tensor:
    """The gradients of a matrix for each of `rows` equal parts of a batch: (rows, weight.numel()).

    A batch of more than `rows` items is cut into as many runs of neighbours, and every run's gradients are summed.

    Args:
        inputs, output_gradient: what went into the module, and the loss's gradient of what came out.
    """
    return contract(*as_tokens(module, inputs, output_gradient), rows)


def as_tokens(module: nn.Linear | nn.Conv2d, inputs: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The two with their last dimension the matrix's: a convolution's tokens are the places of its kernel."""
    if isinstance(module, nn.Conv2d):
        return _patches(module, inputs), output_gradient.flatten(2).mT
    return inputs, output_gradient


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
