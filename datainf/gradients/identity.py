"""What gradients are of, in short strings: by these a store is told from another."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import joblib
import torch
from accelerate.utils import recursively_apply
from torch import nn

from datainf.storage.rows import double_on


def identity(model: nn.Module, dataset: Sequence, loss_fn: Callable) -> dict[str, str]:
    """Short fingerprints of what the gradients are of: trainable weights, base, examples in their order, loss."""
    weights, base, examples = (hashlib.sha256() for _ in range(3))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights.update(name.encode())
            weights.update(joblib.hash(parameter.detach().cpu().float().numpy()).encode())
        else:
            # The frozen base may be huge: its names, shapes and one sum per matrix tell two bases apart.
            total = parameter.detach().to(double_on(parameter.device)).sum(dtype=torch.float64).item()
            base.update(f"{name} {tuple(parameter.shape)} {total:.6e}".encode())
    for index in range(len(dataset)):
        # As arrays: a tensor's pickle depends on where in memory it is.
        example = recursively_apply(lambda tensor: tensor.cpu().numpy(), dataset[index])
        examples.update(joblib.hash(example).encode())
    return {
        "weights": weights.hexdigest()[:16],
        "base": base.hexdigest()[:16],
        "examples": examples.hexdigest()[:16],
        "loss": name_of(loss_fn),
    }


def name_of(function: Callable) -> str:
    """A function's name, with the arguments that functools.partial has bound to it."""
    if isinstance(function, partial):
        bound = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in sorted(function.keywords.items()))]
        return f"{name_of(function.func)}({', '.join(bound)})"
    return getattr(function, "__qualname__", repr(function))
