"""The factors of EK-FAC: second moments of what goes into a matrix and of what comes back to what comes out of it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import default_collate

from datainf import processes
from datainf.errors import InputError
from datainf.gradients.batches import as_sequence, batches, halving
from datainf.gradients.layers import Layers, as_tokens, check_adapters, is_matrix, owners, trainable_layers
from datainf.gradients.per_sample import LossFn, check_at_hand, frozen
from datainf.gradients.recording import Recorder
from datainf.progress import bar
from datainf.storage.rows import double_on
from datainf.storage.store import matrix_shape


def kronecker_factors(
    model: nn.Module,
    dataset: Sequence,
    loss_fn: LossFn,
    *,
    collate_fn: Callable[[list], Mapping] | None = None,
    batch_size: int = 32,
    layers: Layers = None,
) -> dict[str, tuple[Float[Tensor, "out out"], Float[Tensor, "in in"]]]:
    """Layer name -> the sums over all tokens t of (dloss/dy_t) (dloss/dy_t)^T and of x_t x_t^T, in float64.

    x_t goes into the layer's matrix, y_t comes out. Tokens to which nothing comes back, such as padding, are left out.
    Arguments as of `per_sample_gradients`; in several processes each takes some batches, and all return the same.

    Raises:
        InputError: a layer is no plain matrix on tokens or patches, its module sees the batch otherwise than by
            example, or there are no examples.
    """
    dataset = as_sequence(dataset)
    if len(dataset) == 0:
        raise InputError("The dataset has no examples.")
    weights = trainable_layers(model, layers)
    check_adapters(model, weights)
    check_at_hand(model)
    for owner, names in owners(model, weights).items():
        if not is_matrix(owner, names):
            raise InputError(
                f"The layer {next(iter(names.values()))!r} is no plain matrix, so it has no factors: leave it out by "
                "layers=."
            )
    rank, count = processes.rank_and_count()
    mine = list(batches(dataset, 0, len(dataset), batch_size=batch_size, batch_tokens=None))[rank::count]
    device, collate_fn = next(model.parameters()).device, collate_fn or default_collate
    sums = {name: [_zeros(size, device) for size in matrix_shape(weight.shape)] for name, weight in weights.items()}
    with frozen(model), _FactorRecorder(model, weights, rows_per_example=1, parts=1) as recorder:

        def differentiate(indices: list[int]) -> tuple[dict, dict]:
            with recorder.batch_of(len(indices)):
                batch = send_to_device(collate_fn([dataset[index] for index in indices]), device)
                loss_fn(model, batch).sum().backward()
            return differentiate(indices) if recorder.copy_what_was_lost() else (recorder.found, recorder.broken)

        for indices in bar(mine, desc="Kronecker factors", unit="batch"):
            for _, (found, broken) in halving(indices, differentiate):
                for name, why in broken.items():
                    raise InputError(f"The layer {name!r} has no factors, since {why}: leave it out by layers=.")
                for name, sides in found.items():
                    for total, side in zip(sums[name], sides, strict=True):
                        total += side.to(total.device)
    return {name: tuple(map(processes.add_up, sides)) for name, sides in sums.items()}


def _zeros(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    return torch.zeros(size, size, dtype=torch.float64, device=double_on(device))


class _FactorRecorder(Recorder):
    """Keeps of every matrix the two sums over the batch's tokens, instead of its examples' gradients."""

    def _take(self, name: str, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        inputs, gradient = as_tokens(module, inputs, gradient)
        reached = gradient.flatten(0, -2).any(dim=1)
        sides = []
        for side in (gradient, inputs):
            tokens = side.flatten(0, -2)[reached]
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            sides.append(tokens.T @ tokens)
        before = self.found.get(name, (0, 0))  # of a weight that is used twice
        self.found[name] = tuple(a + b for a, b in zip(before, sides, strict=True))
