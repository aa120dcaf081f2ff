"""A forward pass over examples, without gradients."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from datainf.gradients.batches import batches
from datainf.gradients.per_sample import evaluating


@torch.no_grad()
def of_each(
    model: nn.Module,
    examples: Sequence,
    function: Callable[[nn.Module, Mapping], Tensor],
    collate: Callable[[list], Mapping],
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """What a function (model, batch) -> (batch, ...) gives of each of n examples, shape (n, ...), in float32 or bool.

    Like lengths share a batch. Dropout is off; the model is left in the mode it was in.
    """
    found: dict[int, np.ndarray] = {}
    device = next(model.parameters()).device
    with evaluating(model):
        for places in batches(examples, 0, len(examples), batch_size=batch_size, batch_tokens=None):
            values = function(model, send_to_device(collate([examples[index] for index in places]), device))
            values = values.cpu() if values.dtype == torch.bool else values.float().cpu()
            found |= dict(zip(places, values.numpy(), strict=True))
    return np.stack([found[index] for index in range(len(examples))])
