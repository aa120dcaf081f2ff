"""Per-row gradients of any module's weights, through torch.func.

`layers.row_gradients` needs to know how a weight acts. Here the module is simply run again on each row alone,
all rows at once by `vmap`, and differentiated: slower, but right for embeddings, DoRA, IA3, grouped convolutions,
normalizations and whatever else treats each row of a batch by itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import compress

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def tensors_in(output) -> list[Tensor]:
    """The tensors of a module's output through which a gradient can come back."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def functional_gradients(
    module: nn.Module,
    names: Mapping[str, str],
    weights: Mapping[str, Tensor],
    arguments: tuple[tuple, dict],
    is_cut: Sequence[bool],
    output_gradients: Sequence[Tensor | None],
    parts: int,
) -> dict[str, Tensor]:
    """Layer -> the gradients of its weight for each of `parts` equal parts of a batch: (parts, weight.numel()).

    A batch of more than `parts` rows is cut into as many runs of neighbours, and every run's gradients are summed.

    Args:
        names: the weight's name within the module -> its layer.
        weights: layer -> its weight.
        arguments: the args and kwargs the module was called with.
        is_cut: of each leaf of the arguments, whether it is a tensor whose first dimension is the batch. All else is
            passed whole.
        output_gradients: the loss's gradients of `tensors_in` the output; None where it does not depend on it.
    """
    used = [gradient is not None for gradient in output_gradients]
    cotangents = list(compress(output_gradients, used))
    leaves, structure = tree_flatten(arguments)
    primals = {layer: weights[layer].detach() for layer in names.values()}

    def outputs(primals: Mapping[str, Tensor], inputs: Iterable[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
        """What the module makes of one part's inputs, of the shapes of the gradients that came back."""
        inputs = iter(inputs)
        whole = [next(inputs) if cut else leaf for leaf, cut in zip(leaves, is_cut, strict=True)]
        renamed = {name: primals[layer] for name, layer in names.items()}
        # Not tie_weights: a part that shares a weight is an owner of its own.
        output = functional_call(module, renamed, *tree_unflatten(whole, structure), tie_weights=False)
        # What does not depend on the batch came out once for all rows.
        return [t.expand_as(dy) for t, dy in zip(compress(tensors_in(output), used), cotangents, strict=True)]

    gradients = _by_part(outputs, primals, _cut(compress(leaves, is_cut), parts), _cut(cotangents, parts))
    return {
        layer: gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
        for layer, gradient in gradients.items()
    }


def _cut(tensors: Iterable[Tensor], parts: int) -> list[Tensor]:
    """Each (rows, ...) as (parts, rows of a part, ...)."""
    return [tensor.detach().unflatten(0, (parts, -1)) for tensor in tensors]


def _by_part(outputs: Callable, primals: dict[str, Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> dict:
    """Layer -> (parts, *weight.shape): all parts at once, or one by one where torch.func cannot."""
    try:
        return vmap(partial(_by_vjp, outputs, primals))(inputs, cotangents)
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise
    # torch.func knows no autograd.Function of the old style, and no forward that looks at its data.
    rows = [
        _by_autograd(outputs, primals, [tensor[part] for tensor in inputs], [tensor[part] for tensor in cotangents])
        for part in range(len(cotangents[0]))
    ]
    return {layer: torch.stack([row[layer] for row in rows]) for layer in primals}


def _by_vjp(outputs: Callable, primals: dict[str, Tensor], inputs: list, cotangents: list) -> dict[str, Tensor]:
    _, pull_back = vjp(lambda primals: outputs(primals, inputs, cotangents), primals)
    return pull_back(cotangents)[0]


def _by_autograd(outputs: Callable, primals: dict[str, Tensor], inputs: Sequence, cotangents: Sequence) -> dict:
    with torch.enable_grad():
        primals = {layer: primal.clone().requires_grad_() for layer, primal in primals.items()}
        output = outputs(primals, inputs, cotangents)
    gradients = torch.autograd.grad(output, list(primals.values()), cotangents, materialize_grads=True)
    return dict(zip(primals, gradients, strict=True))
